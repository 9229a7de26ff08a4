"""Deltas to bytes and back: one table of (deltas, exact bytes), run both ways.

The readers here share no code with the writer: a small one of our own that is fed at every
possible cut, the OpenAI SDK's, and the line reader that many clients build on.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai._streaming import SSEDecoder
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from ochat_serve.errors import ApiError, InvalidRequest, ServerFault, Unavailable
from ochat_serve.generation import Delta, PositionLogprobs, TokenLogprob, Update, Usage
from ochat_serve.streaming import (
    DONE,
    PING,
    Collector,
    EventWriter,
    FirstSpaces,
    ReplyHead,
    error_event,
)

HEAD = ReplyHead("chatcmpl-1", 1_700_000_000, "m", "fp_0")
CONSTANT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"m",'
    b'"system_fingerprint":"fp_0","service_tier":"default","choices":['
)
USAGE = Usage(prompt_tokens=9, completion_tokens=4, cached_tokens=8)
USAGE_JSON = (
    '{"prompt_tokens":9,"completion_tokens":4,"total_tokens":13,'
    '"prompt_tokens_details":{"cached_tokens":8,"audio_tokens":0},'
    '"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0,'
    '"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}'
)


def position(token: bytes, logprob: float, *top: tuple[bytes, float]) -> PositionLogprobs:
    return PositionLogprobs(
        TokenLogprob(token, logprob), tuple(TokenLogprob(*likely) for likely in top)
    )


def text(value: str, index: int = 0, logprobs: Sequence[PositionLogprobs] | None = None) -> Delta:
    return Delta(index, value, 1, logprobs=logprobs)


def end(reason: Any = "stop", index: int = 0, value: str = "") -> Delta:
    return Delta(index, value, 1, finish_reason=reason)


@dataclass(frozen=True)
class Wire:
    """``updates`` on one side; on the other the end of each chunk as it goes over the wire,
    and what a client should have understood: a text and a finish reason per choice."""

    updates: Sequence[Sequence[Delta]]
    chunks: Sequence[str]
    texts: Sequence[str]
    finish_reasons: Sequence[str | None]
    usage: bool = False
    logprobs: bool = False
    error: ApiError | None = None
    error_json: str = ""

    def written(self, *, obfuscation: bool = False) -> bytes:
        writer = EventWriter(
            HEAD, usage=self.usage, logprobs=self.logprobs, obfuscation=obfuscation
        )
        events = [writer.begin(len(self.texts)), *map(writer.deltas, self.updates)]
        if self.error is not None:
            return b"".join([*events, error_event(self.error)])
        events += [writer.usage(USAGE)] if self.usage else []
        return b"".join([*events, DONE])

    def exact(self) -> bytes:
        events = [CONSTANT + chunk.encode() + b"\n\n" for chunk in self.chunks]
        events += [f"data: {self.error_json}\n\n".encode()] if self.error else []
        return b"".join([*events, b"data: [DONE]\n\n"])


def begin(index: int = 0) -> str:
    return (
        f'{{"index":{index},"delta":{{"role":"assistant","content":"","refusal":null}},'
        '"logprobs":null,"finish_reason":null}]}'
    )


TOP_LOGPROBS = (
    '{"content":[{"token":"Hi","logprob":-0.25,"bytes":[72,105],"top_logprobs":['
    '{"token":"Hi","logprob":-0.25,"bytes":[72,105]},'
    '{"token":"你","logprob":-1.5,"bytes":[228,189,160]}]}],"refusal":null}'
)
HALF_LOGPROBS = (
    '{"content":[{"token":"�","logprob":-0.5,"bytes":[240,159],"top_logprobs":[]}],"refusal":null}'
)

WIRE = {
    "one choice": Wire(
        [[text("Hel")], [text("lo")], [end()]],
        [
            begin(),
            '{"index":0,"delta":{"content":"Hel"},"logprobs":null,"finish_reason":null}]}',
            '{"index":0,"delta":{"content":"lo"},"logprobs":null,"finish_reason":null}]}',
            '{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}',
        ],
        ["Hello"],
        ["stop"],
    ),
    "text and end in one delta": Wire(
        [[end("length", value="Hi")]],
        [
            begin(),
            '{"index":0,"delta":{"content":"Hi"},"logprobs":null,"finish_reason":null}]}',
            '{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}]}',
        ],
        ["Hi"],
        ["length"],
    ),
    "no text at all": Wire(
        [[end()]],
        [begin(), '{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}'],
        [""],
        ["stop"],
    ),
    "two choices, ends apart": Wire(
        [[text("a", 1), text("b", 0)], [end("stop", 1)], [text("c", 0)], [end("length", 0)]],
        [
            begin(0),
            begin(1),
            '{"index":1,"delta":{"content":"a"},"logprobs":null,"finish_reason":null}]}',
            '{"index":0,"delta":{"content":"b"},"logprobs":null,"finish_reason":null}]}',
            '{"index":1,"delta":{},"logprobs":null,"finish_reason":"stop"}]}',
            '{"index":0,"delta":{"content":"c"},"logprobs":null,"finish_reason":null}]}',
            '{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}]}',
        ],
        ["bc", "a"],
        ["length", "stop"],
    ),
    "split emoji: nothing to show, then all of it": Wire(
        [[text("")], [text("")], [text("👩‍🚀")], [end()]],
        [
            begin(),
            '{"index":0,"delta":{"content":"👩‍🚀"},"logprobs":null,"finish_reason":null}]}',
            '{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}',
        ],
        ["👩‍🚀"],
        ["stop"],
    ),
    "CJK": Wire(
        [[text("你好")], [end(value="、世界")]],
        [
            begin(),
            '{"index":0,"delta":{"content":"你好"},"logprobs":null,"finish_reason":null}]}',
            '{"index":0,"delta":{"content":"、世界"},"logprobs":null,"finish_reason":null}]}',
            '{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}',
        ],
        ["你好、世界"],
        ["stop"],
    ),
    "characters with a meaning in JSON or SSE": Wire(
        [[text('"\\\r\n\ndata: [DONE]\n\n\0\t')], [text("\x85\u2028\u2029\x7f</script>")], [end()]],
        [
            begin(),
            '{"index":0,"delta":{"content":"\\"\\\\\\r\\n\\ndata: [DONE]\\n\\n\\u0000\\t"},'
            '"logprobs":null,"finish_reason":null}]}',
            '{"index":0,"delta":{"content":"\\u0085\\u2028\\u2029\x7f</script>"},'
            '"logprobs":null,"finish_reason":null}]}',
            '{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}',
        ],
        ['"\\\r\n\ndata: [DONE]\n\n\0\t\x85\u2028\u2029\x7f</script>'],
        ["stop"],
    ),
    "logprobs": Wire(
        [
            [text("Hi", logprobs=[position(b"Hi", -0.25, (b"Hi", -0.25), ("你".encode(), -1.5))])],
            [text("", logprobs=[position(b"\xf0\x9f", -0.5)])],
            [end()],
        ],
        [
            begin(),
            f'{{"index":0,"delta":{{"content":"Hi"}},"logprobs":{TOP_LOGPROBS},'
            '"finish_reason":null}]}',
            f'{{"index":0,"delta":{{"content":""}},"logprobs":{HALF_LOGPROBS},'
            '"finish_reason":null}]}',
            '{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}',
        ],
        ["Hi"],
        ["stop"],
        logprobs=True,
    ),
    "logprobs that nobody asked for": Wire(
        [[text("Hi", logprobs=[position(b"Hi", -0.25)])], [end()]],
        [
            begin(),
            '{"index":0,"delta":{"content":"Hi"},"logprobs":null,"finish_reason":null}]}',
            '{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]}',
        ],
        ["Hi"],
        ["stop"],
    ),
    "usage": Wire(
        [[text("Hi")], [end()]],
        [
            begin()[:-1] + ',"usage":null}',
            '{"index":0,"delta":{"content":"Hi"},"logprobs":null,"finish_reason":null}],'
            '"usage":null}',
            '{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":null}',
            f'],"usage":{USAGE_JSON}}}',
        ],
        ["Hi"],
        ["stop"],
        usage=True,
    ),
    "error after the first text": Wire(
        [[text("Hi")]],
        [
            begin(),
            '{"index":0,"delta":{"content":"Hi"},"logprobs":null,"finish_reason":null}]}',
        ],
        ["Hi"],
        [None],
        error=Unavailable("The engine\u2028has stopped.", code="engine_dead", retry_after_s=10),
        error_json='{"error":{"message":"The engine\\u2028has stopped.","type":"server_error",'
        '"param":null,"code":"engine_dead"}}',
    ),
    "error with two choices and usage": Wire(
        [[end("stop", 1, "x")]],
        [
            begin(0)[:-1] + ',"usage":null}',
            begin(1)[:-1] + ',"usage":null}',
            '{"index":1,"delta":{"content":"x"},"logprobs":null,"finish_reason":null}],'
            '"usage":null}',
            '{"index":1,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":null}',
        ],
        ["", "x"],
        [None, "stop"],
        usage=True,
        error=InvalidRequest('No "that".', param="stop", code="invalid_value"),
        error_json='{"error":{"message":"No \\"that\\".","type":"invalid_request_error",'
        '"param":"stop","code":"invalid_value"}}',
    ),
}
each_wire = pytest.mark.parametrize("wire", WIRE.values(), ids=WIRE.keys())


class SseReader:
    """Server-sent events as the standard has them, for streams of ``data`` alone."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, data: bytes) -> list[str]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        events = []
        for line in lines:
            if line == b"":
                events += ["\n".join(self._data)] if self._data else []
                self._data = []
            elif not line.startswith(b":"):
                name, _, value = line.decode().partition(":")
                assert name == "data"
                self._data.append(value.removeprefix(" "))
        return events

    def read(self, *pieces: bytes) -> list[str]:
        events = [event for piece in pieces for event in self.feed(piece)]
        assert (self._rest, self._data) == (b"", [])
        return events


@dataclass
class Understood:
    """What a client makes of a stream.  Raises AssertionError for one out of order."""

    texts: dict[int, str] = field(default_factory=dict)
    finish_reasons: dict[int, str | None] = field(default_factory=dict)
    tokens: dict[int, list[Any]] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    @classmethod
    def of(cls, events: Sequence[str]) -> "Understood":
        *chunks, last = events
        assert last == "[DONE]"
        understood = cls()
        for chunk in map(json.loads, chunks):
            assert understood.error is None, "an error is the last event"
            if "error" in chunk:
                understood.error = chunk["error"]
                continue
            assert (chunk["object"], chunk["created"]) == ("chat.completion.chunk", HEAD.created)
            assert (chunk["id"], chunk["model"]) == (HEAD.id, HEAD.model)
            assert understood.usage is None, "usage comes last"
            understood.usage = chunk.get("usage")
            assert bool(chunk["choices"]) is (understood.usage is None)
            for choice in chunk["choices"]:
                understood._choice(choice)
        return understood

    def _choice(self, choice: dict[str, Any]) -> None:
        index, delta = choice["index"], choice["delta"]
        if index not in self.texts:
            assert delta == {"role": "assistant", "content": "", "refusal": None}
            self.texts[index], self.finish_reasons[index], self.tokens[index] = "", None, []
            return
        assert "role" not in delta, "the role is said once"
        assert self.finish_reasons[index] is None, "nothing follows the end of a choice"
        self.texts[index] += delta.get("content", "")
        self.tokens[index] += (choice["logprobs"] or {"content": []})["content"]
        self.finish_reasons[index] = choice["finish_reason"]


def collected(wire: Wire) -> Collector:
    collector = Collector(len(wire.texts))
    for update in wire.updates:
        collector.add(update)
    return collector


def no_extras(model: BaseModel) -> None:
    """The SDK's types take unknown fields: here nothing may be one."""
    assert not model.model_extra
    for name in type(model).model_fields:
        value = getattr(model, name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, BaseModel):
                no_extras(item)


@each_wire
def test_written_bytes(wire: Wire):
    assert wire.written() == wire.exact()


@each_wire
def test_read_back(wire: Wire):
    understood = Understood.of(SseReader().read(wire.exact()))
    assert understood.texts == dict(enumerate(wire.texts))
    assert understood.finish_reasons == dict(enumerate(wire.finish_reasons))
    ends_with_usage = wire.usage and wire.error is None
    assert understood.usage == (json.loads(USAGE_JSON) if ends_with_usage else None)
    assert understood.error == (wire.error.body()["error"] if wire.error else None)


@each_wire
def test_read_back_cut_at_every_byte(wire: Wire):
    data = wire.exact()
    whole = SseReader().read(data)
    for cut in range(1, len(data)):
        assert SseReader().read(data[:cut], data[cut:]) == whole, cut
    assert SseReader().read(*(bytes([byte]) for byte in data)) == whole


@each_wire
def test_read_back_by_other_readers(wire: Wire):
    """The SDK's decoder, and httpx's lines, which end where ``str.splitlines`` does."""
    data = wire.exact()
    whole = SseReader().read(data)
    assert [event.data for event in SSEDecoder().iter_bytes(iter([data]))] == whole
    lines = httpx.Response(200, content=data).iter_lines()
    assert [line.removeprefix("data: ") for line in lines if line] == whole


@each_wire
def test_a_ping_between_events_is_nothing(wire: Wire):
    events = [event + b"\n\n" for event in wire.exact().split(b"\n\n")[:-1]]
    with_pings = PING + PING.join(events)
    assert SseReader().read(with_pings) == SseReader().read(wire.exact())
    assert [
        event.data for event in SSEDecoder().iter_bytes(iter([with_pings]))
    ] == SseReader().read(wire.exact())


@each_wire
@pytest.mark.parametrize("obfuscation", [False, True])
def test_chunks_are_the_sdks(wire: Wire, obfuscation: bool):
    for event in SseReader().read(wire.written(obfuscation=obfuscation))[:-1]:
        if '"error"' in event[:10]:
            continue
        chunk = ChatCompletionChunk.model_validate_json(event, strict=True)
        no_extras(chunk)
        assert {"id", "object", "created", "model", "choices"} <= chunk.model_fields_set
        assert chunk.service_tier == "default"
        assert chunk.system_fingerprint == "fp_0"
        # With usage asked for, every chunk has the field and only the last one a value.
        assert ("usage" in chunk.model_fields_set) is wire.usage
        assert (chunk.usage is not None) is (chunk.choices == [])
        assert ("obfuscation" in chunk.model_fields_set) is (obfuscation and chunk.choices != [])


@each_wire
@pytest.mark.parametrize("metadata", [None, {}, {"k": "v\u2028"}])
def test_the_one_body_says_the_same(wire: Wire, metadata: dict[str, str] | None):
    collector = collected(wire)
    assert collector.texts == list(wire.texts)
    if wire.error is not None:
        return  # a failed generation has no body: the choices need a finish reason
    body = collector.body(HEAD, USAGE, logprobs=wire.logprobs, metadata=metadata)
    answer = ChatCompletion.model_validate_json(body, strict=True)
    no_extras(answer)
    assert [choice.message.content for choice in answer.choices] == list(wire.texts)
    assert [choice.finish_reason for choice in answer.choices] == list(wire.finish_reasons)
    assert [choice.index for choice in answer.choices] == list(range(len(wire.texts)))
    fields = json.loads(body)
    streamed = Understood.of(SseReader().read(wire.exact()))
    assert [choice["logprobs"] for choice in fields["choices"]] == [
        {"content": tokens, "refusal": None} if wire.logprobs else None
        for tokens in streamed.tokens.values()
    ]
    assert fields["usage"] == json.loads(USAGE_JSON)
    assert fields["object"] == "chat.completion"
    assert (fields["id"], fields["created"], fields["model"]) == (HEAD.id, HEAD.created, "m")
    assert fields.get("metadata") == metadata


Piece = tuple[int, str]
texts_of_choices = st.lists(st.tuples(st.integers(0, 2), st.text(max_size=8)), max_size=12)


@settings(deadline=None)
@given(texts_of_choices, st.booleans(), st.booleans())
def test_every_text_arrives(pieces: list[Piece], usage: bool, obfuscation: bool):
    """Stream, one body and the pieces themselves are one text, whatever is in it."""
    writer = EventWriter(HEAD, usage=usage, logprobs=False, obfuscation=obfuscation)
    collector = Collector(3)
    data = writer.begin(3)
    for index, value in pieces:
        data += writer.deltas([text(value, index)])
        collector.add([text(value, index)])
    lines = httpx.Response(200, content=data + DONE).iter_lines()
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events == SseReader().read(data + DONE)
    told = ["".join(value for at, value in pieces if at == index) for index in range(3)]
    assert [*Understood.of(events).texts.values()] == told
    body = json.loads(collector.body(HEAD, Usage(0), logprobs=False, metadata=None))
    assert [choice["message"]["content"] for choice in body["choices"]] == told
    assert collector.texts == told


def padded_delta(chunk: bytes) -> tuple[bytes, str]:
    """The bytes of a chunk's delta, and its padding."""
    match = re.search(rb'"delta":(\{.*\}),"logprobs":', chunk)
    assert match is not None
    return match[1], json.loads(chunk.removeprefix(b"data: "))["obfuscation"]


@given(st.text(max_size=80), st.sampled_from([None, "stop", "length"]))
def test_padding_hides_the_length_of_the_text(value: str, reason: Any):
    writer = EventWriter(HEAD, usage=False, logprobs=False, obfuscation=True)
    events = writer.begin(1) + writer.deltas([end(reason, value=value)])
    for chunk in events.split(b"\n\n")[:-1]:
        delta, padding = padded_delta(chunk)
        assert (len(delta) + len(padding)) % 32 == 0
        assert len(padding) < 32


def test_padding_is_unforeseeable():
    writer = EventWriter(HEAD, usage=False, logprobs=False, obfuscation=True)
    paddings = {padded_delta(writer.deltas([text("Hi")]))[1] for _ in range(20)}
    assert len(paddings) == 20


def test_nothing_to_show_is_no_bytes():
    """So that no empty write wakes a client."""
    writer = EventWriter(HEAD, usage=True, logprobs=True, obfuscation=True)
    assert writer.deltas([]) == b""
    assert writer.deltas([text(""), text("", 1, [])]) == b""


@pytest.mark.parametrize(
    ("given_logprob", "written"),
    [
        (-math.inf, -9999.0),
        (math.nan, -9999.0),
        (-1e30, -9999.0),
        (-9999.0, -9999.0),
        (-0.5, -0.5),
        (0.0, 0.0),
        (1e-7, 0.0),
        (math.inf, 0.0),
    ],
)
def test_logprobs_are_numbers_in_json(given_logprob: float, written: float):
    """Float arithmetic gives more values than a probability has; JSON has fewer."""
    delta = text("a", logprobs=[position(b"a", given_logprob, (b"b", given_logprob))])
    chunk = EventWriter(HEAD, usage=False, logprobs=True, obfuscation=False).deltas([delta])
    collector = Collector(1)
    collector.add([delta])
    body = collector.body(HEAD, Usage(0), logprobs=True, metadata=None)
    for data in (chunk.removeprefix(b"data: "), body):
        (token,) = json.loads(data)["choices"][0]["logprobs"]["content"]
        assert (token["logprob"], token["top_logprobs"][0]["logprob"]) == (written, written)


@pytest.mark.parametrize(
    ("token_bytes", "token"),
    [(b"\xf0\x9f", "�"), (b"\xff", "�"), (b"", ""), ("é".encode(), "é"), (b" \n", " \n")],
)
def test_tokens_keep_their_bytes(token_bytes: bytes, token: str):
    """A client joins the bytes of tokens that are no text by themselves."""
    writer = EventWriter(HEAD, usage=False, logprobs=True, obfuscation=False)
    chunk = writer.deltas([text("", logprobs=[position(token_bytes, -1.0)])])
    (told,) = json.loads(chunk.removeprefix(b"data: "))["choices"][0]["logprobs"]["content"]
    assert (told["token"], bytes(told["bytes"])) == (token, token_bytes)


@pytest.mark.parametrize(
    ("pieces", "texts"),
    [
        ([(0, " Hi"), (0, " you")], ["Hi you"]),
        ([(0, "  Hi")], [" Hi"]),
        ([(0, "Hi"), (0, " you")], ["Hi you"]),
        ([(0, ""), (0, " "), (0, " Hi")], [" Hi"]),
        ([(0, ""), (0, "Hi")], ["Hi"]),
        ([(0, "\n Hi")], ["\n Hi"]),
        ([(0, "\u3000Hi")], ["\u3000Hi"]),
        ([(1, " b"), (0, " a"), (1, " b"), (0, " a")], ["a a", "b b"]),
        ([], [""]),
    ],
)
def test_one_space_goes_from_the_front_of_each_choice(pieces: list[Piece], texts: list[str]):
    spaces, collector = FirstSpaces(), Collector(len(texts))
    for index, text in pieces:
        update = Update([Delta(index, text, 1)])
        spaces.remove(update)
        collector.add(update.deltas)
    assert collector.texts == texts


def test_the_space_goes_from_its_token_too():
    """The tokens' bytes still make the text."""
    spaces, deltas = FirstSpaces(), []
    for piece in (b" Hi", b" you"):
        token = TokenLogprob(piece, -1.0)
        delta = Delta(0, piece.decode(), 1, None, [PositionLogprobs(token, (token,))])
        spaces.remove(Update([delta]))
        deltas.append(delta)
    tokens = [delta.logprobs[0].sampled.token_bytes for delta in deltas]
    assert b"".join(tokens).decode() == "".join(delta.text for delta in deltas) == "Hi you"


def test_errors_in_a_stream_end_it():
    events = SseReader().read(error_event(ServerFault()))
    assert events[1:] == ["[DONE]"]
    assert json.loads(events[0]) == ServerFault().body()
