"""A model's own chat template (Jinja), made safe for text from outside.

The template sees every message with its control tokens broken: a guard character stands
inside each, so what looks like a control token in the rendered prompt was written by the
template.  The rendered prompt is then cut at those, the guards are taken out, and the
rest is plain text.  Honest text needs no guard, and its prompt is encoded whole: the same
ids as everywhere else.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ochat_serve.generation import Conversation
from ochat_serve.templates.segments import Literal, Plain, Segment, join_system

# (messages, add_generation_prompt) -> rendered prompt
ApplyTemplate = Callable[[list[dict[str, str]], bool], str]

_PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))
_PROBE = "\N{LEFT WHITE CORNER BRACKET}probe\N{RIGHT WHITE CORNER BRACKET}"


@dataclass(frozen=True, slots=True)
class ControlToken:
    """A token that structures prompts; ``lstrip`` and ``rstrip`` swallow white space beside it."""

    text: str
    lstrip: bool = False
    rstrip: bool = False


class HfTemplate:
    """The chat template that came with a model.

    ``control_tokens`` are the vocabulary's; ``apply`` renders and raises
    ``errors.InvalidRequest`` where the template refuses the messages.
    """

    name = "hf"
    default_temperature = 1.0
    uses_condition = False
    adds_bos = False  # the template writes its own

    def __init__(self, apply: ApplyTemplate, control_tokens: Iterable[ControlToken]) -> None:
        self._apply = apply
        tokens = sorted(control_tokens, key=lambda token: len(token.text), reverse=True)
        self._texts = tuple(token.text for token in tokens)
        self._cut = re.compile("|".join(f"({_pattern(token)})" for token in tokens) or r"(?!)")
        self._find = re.compile("|".join(map(re.escape, self._texts)) or r"(?!)")
        self._beginnings = {text[:size] for text in self._texts for size in range(1, len(text))}
        self._endings = {text[size:] for text in self._texts for size in range(1, len(text))}
        self._hints = {text[:2] for text in self._texts}
        self._longest = max(map(len, self._texts), default=0)
        self.end_of_turn = self._first_token_after_assistant()

    def segments(self, conversation: Conversation) -> Sequence[Segment]:
        system, chat = join_system(conversation)
        turns = [("system", system)] if system else []
        turns += [(turn.role, turn.text) for turn in chat.turns]
        guard, mark = self._unused_characters([text for _, text in turns])
        messages = [{"role": role, "content": self._guarded(text, guard)} for role, text in turns]
        continues = bool(turns) and turns[-1][0] == "assistant"
        if continues:
            messages[-1]["content"] += mark
        prompt = self._apply(messages, not continues)
        if continues:
            prompt = prompt[: prompt.rindex(mark)] if mark in prompt else prompt
        if guard not in prompt:
            return [Literal(prompt)]
        return self._pieces(prompt, guard)

    def _pieces(self, prompt: str, guard: str) -> list[Segment]:
        """The prompt cut at the control tokens, all of which are the template's own."""
        pieces: list[Segment] = []
        end = 0
        for found in self._cut.finditer(prompt):
            pieces.append(Plain(prompt[end : found.start()].replace(guard, "")))
            pieces.append(Literal(self._texts[(found.lastindex or 1) - 1]))
            end = found.end()
        pieces.append(Plain(prompt[end:].replace(guard, "")))
        return [piece for piece in pieces if piece.text]

    def _guarded(self, text: str, guard: str) -> str:
        """``text`` with a guard inside every control token, and inside every part of one at
        its edges: two texts side by side must not make one either."""
        if any(hint in text for hint in self._hints):
            text = self._find.sub(lambda found: found[0][0] + guard + found[0][1:], text)
        ending = self._edge(text.rstrip()[-self._longest :], self._beginnings, from_end=True)
        if ending:
            at = len(text.rstrip()) - ending + 1
            text = text[:at] + guard + text[at:]
        beginning = self._edge(text.lstrip()[: self._longest], self._endings, from_end=False)
        if beginning:
            at = len(text) - len(text.lstrip())
            text = text[:at] + guard + text[at:]
        return text

    @staticmethod
    def _edge(edge: str, parts: set[str], *, from_end: bool) -> int:
        """The length of the longest part of a control token at one edge of a text."""
        for size in range(len(edge), 0, -1):
            if (edge[-size:] if from_end else edge[:size]) in parts:
                return size
        return 0

    @staticmethod
    def _unused_characters(texts: list[str]) -> tuple[str, str]:
        """Two private-use characters that occur in none of the texts."""
        first, second = map(chr, _PRIVATE_USE[:2])
        if not any(first in text or second in text for text in texts):
            return first, second
        used: set[str] = set().union(*texts)
        free = (char for char in map(chr, _PRIVATE_USE) if char not in used)
        # There are more private-use characters than a request body can hold.
        return next(free), next(free)

    def _first_token_after_assistant(self) -> str | None:
        """How this template ends a turn: seen by rendering one."""
        prompt = self._apply(
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}], False
        )
        at = prompt.find(_PROBE)
        found = self._cut.search(prompt, at + len(_PROBE)) if at >= 0 else None
        return self._texts[(found.lastindex or 1) - 1] if found else None


def _pattern(token: ControlToken) -> str:
    before = r"\s*" if token.lstrip else ""
    after = r"\s*" if token.rstrip else ""
    return before + re.escape(token.text) + after
