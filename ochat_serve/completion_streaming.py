"""Deltas become bytes in the shapes of ``/v1/completions``; see ``streaming`` for the chat's."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ochat_serve.generation import Delta, FinishReason, PositionLogprobs, Usage
from ochat_serve.streaming import ReplyHead, finite, padding, to_json, usage_fields


def _head(head: ReplyHead) -> bytes:
    """One body and every chunk are of one kind, and have no service tier."""
    fields = head.fields("text_completion")
    del fields["service_tier"]
    return to_json(fields)[:-1] + b',"choices":['


class TextOffsets:
    """Where in a choice's text each token begins, in characters.  A token that begins within a
    character begins where that does."""

    def __init__(self) -> None:
        self._begun = 0

    def next(self, token_bytes: bytes) -> int:
        within = bool(token_bytes) and _continues(token_bytes[0]) and self._begun > 0
        offset = self._begun - within
        self._begun += sum(not _continues(byte) for byte in token_bytes)
        return offset


def _continues(byte: int) -> bool:
    """Whether a byte of UTF-8 is not the first of its character."""
    return byte & 0xC0 == 0x80


# The four lists of a legacy ``logprobs`` object, each as JSON without its brackets.
Positions = tuple[bytes, bytes, bytes, bytes]
_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class CompletionWriter:
    """``streaming.EventWriter`` for texts.  ``echoes`` has the text before each choice, if any."""

    def __init__(
        self,
        head: ReplyHead,
        *,
        usage: bool,
        logprobs: bool,
        obfuscation: bool,
        echoes: Sequence[str] = (),
    ) -> None:
        self._head = b"data: " + _head(head)
        self._end = b',"usage":null' if usage else b""
        self._logprobs = logprobs
        self._obfuscation = obfuscation
        self._echoes = echoes
        self._offsets: dict[int, TextOffsets] = {}

    def begin(self, choices: int) -> bytes:
        """The prompts, where they are asked for."""
        return b"".join(
            self._chunk(index, to_json(text), b"null", b"null")
            for index, text in enumerate(self._echoes)
        )

    def deltas(self, deltas: Iterable[Delta]) -> bytes:
        """The chunks of one update; b"" where it holds nothing to show yet."""
        return b"".join(map(self._delta, deltas))

    def _delta(self, delta: Delta) -> bytes:
        logprobs = b"null"
        if self._logprobs and delta.logprobs:
            offsets = self._offsets.setdefault(delta.index, TextOffsets())
            logprobs = _logprobs_json([_positions(delta.logprobs, offsets)])
        elif not delta.text and delta.finish_reason is None:
            return b""
        finish = b"null" if delta.finish_reason is None else to_json(delta.finish_reason)
        return self._chunk(delta.index, to_json(delta.text), finish, logprobs)

    def _chunk(self, index: int, text: bytes, finish: bytes, logprobs: bytes) -> bytes:
        end = self._end + padding(len(text)) if self._obfuscation else self._end
        choice = b'{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s}]' % (
            index,
            text,
            logprobs,
            finish,
        )
        return b"".join((self._head, choice, end, b"}\n\n"))

    def usage(self, usage: Usage) -> bytes:
        """The last chunk of a stream that was asked for its usage."""
        return self._head + b'],"usage":' + to_json(usage_fields(usage)) + b"}\n\n"


@dataclass(slots=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    positions: list[Positions] = field(default_factory=list)
    offsets: TextOffsets = field(default_factory=TextOffsets)
    finish_reason: FinishReason | None = None


class CompletionCollector:
    """``streaming.Collector`` for texts."""

    def __init__(self, choices: int, *, echoes: Sequence[str] = ()) -> None:
        self._choices = [_Choice() for _ in range(choices)]
        self._echoes = echoes or [""] * choices

    def add(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            choice = self._choices[delta.index]
            choice.texts.append(delta.text)
            if delta.logprobs:  # rendered as they come: thousands at once would hold up the loop
                choice.positions.append(_positions(delta.logprobs, choice.offsets))
            choice.finish_reason = delta.finish_reason or choice.finish_reason

    @property
    def texts(self) -> list[str]:
        """What was generated, without the prompts."""
        return ["".join(choice.texts) for choice in self._choices]

    def body(
        self, head: ReplyHead, usage: Usage, *, logprobs: bool, metadata: dict[str, str] | None
    ) -> bytes:
        """The JSON body of the whole answer; there is no metadata in it."""
        choices = b",".join(
            b'{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s}'
            % (
                index,
                to_json(echo + "".join(choice.texts)),
                _logprobs_json(choice.positions) if logprobs else b"null",
                to_json(choice.finish_reason),
            )
            for index, (echo, choice) in enumerate(zip(self._echoes, self._choices, strict=True))
        )
        return _head(head) + choices + b'],"usage":' + to_json(usage_fields(usage)) + b"}"


def _positions(positions: Sequence[PositionLogprobs], offsets: TextOffsets) -> Positions:
    tokens = [_name(position.sampled.token_bytes) for position in positions]
    logprobs = [finite(position.sampled.logprob) for position in positions]
    begin = [offsets.next(position.sampled.token_bytes) for position in positions]
    top = list(map(_top, positions))
    return _inside(tokens), _inside(logprobs), _inside(top), _inside(begin)


def _inside(values: list[Any]) -> bytes:
    return to_json(values)[1:-1]


def _top(position: PositionLogprobs) -> dict[str, float]:
    """The likeliest tokens, and the one that was sampled even if it is none of them."""
    return {
        _name(token.token_bytes): finite(token.logprob)
        for token in (*position.top, position.sampled)
    }


def _name(token_bytes: bytes) -> str:
    """A token as text; where its bytes are none, as OpenAI spells them: names stay different."""
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


def _logprobs_json(positions: Sequence[Positions]) -> bytes:
    lists = (b",".join(part[place] for part in positions) for place in range(len(_LISTS)))
    return b"{%s}" % b",".join(
        b'"%s":[%s]' % (name.encode(), values) for name, values in zip(_LISTS, lists, strict=True)
    )
