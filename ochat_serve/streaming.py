"""Deltas become bytes here, in two forms: a stream of events, or one body.

All that is constant in a stream's chunks is rendered once per request; per delta only the
JSON string of its text is made.  Nothing here waits or reads a clock.
"""

import json
import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ochat_serve.errors import ApiError
from ochat_serve.generation import (
    Delta,
    FinishReason,
    PositionLogprobs,
    TokenLogprob,
    Update,
    Usage,
)

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
# With obfuscation every chunk's text is padded to a multiple of this many bytes, so that the
# length of an encrypted packet tells little about the token inside.
_OBFUSCATION_STEP = 32
# OpenAI's value for "no probability": JSON has no infinities.
_LOWEST_LOGPROB = -9999.0

# Not line breaks to SSE, but to readers built on ``str.splitlines`` (httpx's ``iter_lines``):
# raw, they would cut an event in two.
_LINE_BREAKS = ("\x85", "\u2028", "\u2029")

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def to_json(value: Any) -> bytes:
    """JSON that is one line to every reader."""
    text = _encode(value)
    if not text.isascii():
        for char in _LINE_BREAKS:
            text = text.replace(char, f"\\u{ord(char):04x}")
    return text.encode()


@dataclass(frozen=True, slots=True)
class ReplyHead:
    """What every chunk and the one body say about themselves.  ``created`` is in Unix seconds."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    def fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "service_tier": "default",
        }


class EventWriter:
    """The events of one stream.  Every method returns whole events, ready to be sent."""

    def __init__(self, head: ReplyHead, *, usage: bool, logprobs: bool, obfuscation: bool) -> None:
        fields = to_json(head.fields("chat.completion.chunk"))
        self._head = b"data: " + fields[:-1] + b',"choices":['
        self._end = b',"usage":null' if usage else b""
        self._logprobs = logprobs
        self._obfuscation = obfuscation
        self._open: dict[int, bytes] = {}

    def begin(self, choices: int) -> bytes:
        """The first chunk of every choice: the role."""
        delta = b'{"role":"assistant","content":"","refusal":null}'
        return b"".join(self._chunk(index, delta, b"null") for index in range(choices))

    def deltas(self, deltas: Iterable[Delta]) -> bytes:
        """The chunks of one update; b"" where it holds nothing to show yet."""
        return b"".join(map(self._delta, deltas))

    def _delta(self, delta: Delta) -> bytes:
        chunk = b""
        if delta.text or (self._logprobs and delta.logprobs):
            content = to_json(delta.text)
            logprobs = (
                _logprobs_json(_positions_json(delta.logprobs or ())) if self._logprobs else b"null"
            )
            chunk = self._chunk(delta.index, b'{"content":' + content + b"}", b"null", logprobs)
        if delta.finish_reason is not None:
            chunk += self._chunk(delta.index, b"{}", b'"' + delta.finish_reason.encode() + b'"')
        return chunk

    def _chunk(self, index: int, delta: bytes, finish: bytes, logprobs: bytes = b"null") -> bytes:
        head = self._open.get(index)
        if head is None:
            head = self._open[index] = self._head + b'{"index":%d,"delta":' % index
        end = self._end + padding(len(delta)) if self._obfuscation else self._end
        return b"".join(
            (
                head,
                delta,
                b',"logprobs":',
                logprobs,
                b',"finish_reason":',
                finish,
                b"}]",
                end,
                b"}\n\n",
            )
        )

    def usage(self, usage: Usage) -> bytes:
        """The last chunk of a stream that was asked for its usage."""
        return self._head + b'],"usage":' + to_json(usage_fields(usage)) + b"}\n\n"


def padding(size: int) -> bytes:
    """What makes a text of ``size`` bytes no shorter than others; the end of a chunk."""
    length = -size % _OBFUSCATION_STEP
    return b',"obfuscation":"%s"' % secrets.token_urlsafe(_OBFUSCATION_STEP)[:length].encode()


def error_event(error: ApiError) -> bytes:
    """An error in a stream that has begun, and the stream's end."""
    return b"data: " + to_json(error.body()) + b"\n\n" + DONE


@dataclass(slots=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    logprobs: list[bytes] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Collector:
    """Gathers the deltas of every choice into the one-body answer."""

    def __init__(self, choices: int) -> None:
        self._choices = [_Choice() for _ in range(choices)]

    def add(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            choice = self._choices[delta.index]
            choice.texts.append(delta.text)
            if delta.logprobs:  # rendered as they come: thousands at once would hold up the loop
                choice.logprobs.append(_positions_json(delta.logprobs))
            choice.finish_reason = delta.finish_reason or choice.finish_reason

    @property
    def texts(self) -> list[str]:
        return ["".join(choice.texts) for choice in self._choices]

    def body(
        self, head: ReplyHead, usage: Usage, *, logprobs: bool, metadata: dict[str, str] | None
    ) -> bytes:
        """The JSON body of the whole answer."""
        fields = to_json(head.fields("chat.completion"))
        choices = b",".join(
            self._choice(index, choice, logprobs) for index, choice in enumerate(self._choices)
        )
        ending: dict[str, Any] = {"usage": usage_fields(usage)}
        if metadata is not None:
            ending["metadata"] = metadata
        return fields[:-1] + b',"choices":[' + choices + b"]," + to_json(ending)[1:]

    @staticmethod
    def _choice(index: int, choice: _Choice, logprobs: bool) -> bytes:
        message = {"role": "assistant", "content": "".join(choice.texts), "refusal": None}
        return b'{"index":%d,"message":%s,"logprobs":%s,"finish_reason":%s}' % (
            index,
            to_json(message),
            _logprobs_json(b",".join(choice.logprobs)) if logprobs else b"null",
            to_json(choice.finish_reason),
        )


def usage_fields(usage: Usage) -> dict[str, Any]:
    """OpenAI's ``usage`` object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _positions_json(positions: Iterable[PositionLogprobs]) -> bytes:
    """The positions of a choice's ``logprobs``, as JSON objects with commas between."""
    return b",".join(
        to_json(
            _token_fields(position.sampled)
            | {"top_logprobs": [_token_fields(token) for token in position.top]}
        )
        for position in positions
    )


def _logprobs_json(positions: bytes) -> bytes:
    """OpenAI's ``logprobs`` object of a choice."""
    return b'{"content":[' + positions + b'],"refusal":null}'


def _token_fields(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.token_bytes.decode("utf-8", "replace"),
        "logprob": finite(token.logprob),
        "bytes": list(token.token_bytes),
    }


def finite(logprob: float) -> float:
    """A log probability that JSON can say."""
    if math.isnan(logprob):
        return _LOWEST_LOGPROB
    return min(max(logprob, _LOWEST_LOGPROB), 0.0)


def _remove_first_space(delta: Delta) -> None:
    """In the text and in the token that brought it, so that the bytes still make the text."""
    delta.text = delta.text.removeprefix(" ")
    if delta.logprobs:
        first, *others = delta.logprobs
        token = first.sampled
        stripped = TokenLogprob(token.token_bytes.removeprefix(b" "), token.logprob)
        delta.logprobs = [PositionLogprobs(stripped, first.top), *others]


class FirstSpaces:
    """Takes one space away from the beginning of each choice's text.

    For tokenizers that put a space before every text encoded on its own, as they did before
    the assistant's turns in training.
    """

    def __init__(self) -> None:
        self._begun: set[int] = set()

    def remove(self, update: Update) -> None:
        for delta in update.deltas:
            if delta.text and delta.index not in self._begun:
                self._begun.add(delta.index)
                _remove_first_space(delta)
