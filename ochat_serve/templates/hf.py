"""A model's own chat template (Jinja), made safe for text from outside.

The template sees every message with its control tokens broken: guard characters stand
around and inside each, so what looks like a control token in the rendered prompt was written
by the template.  The rendered prompt is then cut at those, the guards are taken out, and the
rest is plain text.  A tokenizer itself cuts a prompt at its control tokens before anything
else, so honest text has the same ids as everywhere else.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ochat_serve.errors import InvalidRequest
from ochat_serve.generation import Conversation
from ochat_serve.templates.segments import Literal, Plain, Segment, join_system

# (messages, add_generation_prompt) -> rendered prompt
ApplyTemplate = Callable[[list[dict[str, str]], bool], str]

_PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))
_PROBE = "\N{LEFT WHITE CORNER BRACKET}probe\N{RIGHT WHITE CORNER BRACKET}"
_SPACE = re.compile(r"\s+")


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
    reads_texts = True

    def __init__(self, apply: ApplyTemplate, control_tokens: Iterable[ControlToken]) -> None:
        self._apply = apply
        self._tokens = {token.text: token for token in control_tokens}
        self._texts = sorted(self._tokens, key=len, reverse=True)
        self._find = re.compile(any_of(self._texts))
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
        if continues and mark in prompt:
            prompt = prompt[: prompt.rindex(mark)]
        return self._pieces(prompt, guard)

    def _pieces(self, prompt: str, guard: str) -> list[Segment]:
        """The prompt cut at the control tokens, all of which are the template's own."""
        pieces: list[Segment] = []
        end = 0
        for found in self._find.finditer(prompt):
            token = self._tokens[found[0]]
            before = prompt[end : found.start()]
            pieces.append(_plain(before.rstrip() if token.lstrip else before, guard, end))
            pieces.append(Literal(token.text))
            end = found.end()
            if token.rstrip and (space := _SPACE.match(prompt, end)):
                end = space.end()
        pieces.append(_plain(prompt[end:], guard, end))
        return [piece for piece in pieces if piece.text]

    def _guarded(self, text: str, guard: str) -> str:
        """``text`` with guards in every control token, and in every part of one at its edges:
        texts side by side, or in the template's brackets, must not make one either."""
        if any(hint in text for hint in self._hints):
            text = self._find.sub(lambda found: _apart(found[0], guard), text)
        body = text.strip()  # a template may trim
        if not body:
            return text
        at = len(text) - len(text.lstrip())
        before, after = text[:at], text[at + len(body) :]
        if len(body) < self._longest and any(body in token for token in self._texts):
            return before + _apart(body, guard) + after
        if size := self._edge(body[-self._longest :], self._beginnings, from_end=True):
            body = body[:-size] + _apart(body[-size:], guard)
        if size := self._edge(body[: self._longest], self._endings, from_end=False):
            body = _apart(body[:size], guard) + body[size:]
        return before + body + after

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
        free = [char for char in map(chr, _PRIVATE_USE) if char not in used]
        if len(free) < 2:
            raise InvalidRequest(
                "The messages hold every private-use character of Unicode; two must be left over.",
                param="messages",
            )
        return free[0], free[1]

    def _first_token_after_assistant(self) -> str | None:
        """How this template ends a turn: seen by rendering one."""
        question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant"}
        try:
            prompt = self._apply([question, answer | {"content": _PROBE}], False)
        except InvalidRequest:
            return None  # a template of its own kind: the model's end of sequence must do
        at = prompt.find(_PROBE)
        found = self._find.search(prompt, at + len(_PROBE)) if at >= 0 else None
        return found[0] if found else None


def any_of(texts: Iterable[str]) -> str:
    """A pattern for the longest of ``texts`` that stands at a place.

    As a tree: side by side, each of Llama-3's 256 tokens would be tried wherever a text has their
    common beginning, and megabytes of ``<|<|<|`` would stop the server for seconds.
    """
    root: dict[str, Any] = {}
    for text in texts:
        node = root
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}  # a text ends here
    return _branches(root) or r"(?!)"


def _branches(node: dict[str, Any]) -> str:
    longer = [re.escape(char) + _branches(inner) for char, inner in node.items() if char]
    if not longer:
        return ""
    if "" in node:
        return f"(?:{'|'.join(longer)})?"
    return longer[0] if len(longer) == 1 else f"(?:{'|'.join(longer)})"


def _plain(text: str, guard: str, end: int) -> Plain:
    return Plain(text.replace(guard, ""), inside=end > 0)


def _apart(part: str, guard: str) -> str:
    """Guards around every character: also what lies inside or across a control token breaks."""
    return guard + "".join(char + guard for char in part)
