"""Deltas to the bytes of ``/v1/completions``: one table of (deltas, exact bytes), in both forms."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion

from ochat_serve.completion_streaming import (
    CompletionCollector,
    CompletionWriter,
    TextOffsets,
)
from ochat_serve.generation import Delta, PositionLogprobs, TokenLogprob, Usage
from ochat_serve.streaming import DONE, ReplyHead
from tests.test_streaming import USAGE, USAGE_JSON, SseReader, end, position, text

HEAD = ReplyHead("cmpl-1", 1_700_000_000, "m", "fp_0")
FIELDS = (
    b'{"id":"cmpl-1","object":"text_completion","created":1700000000,"model":"m",'
    b'"system_fingerprint":"fp_0","choices":['
)


@dataclass(frozen=True)
class Wire:
    """``updates`` on one side; on the other the choices of the stream's chunks and those of the
    one body, as they go over the wire."""

    updates: Sequence[Sequence[Delta]]
    chunks: Sequence[str]
    choices: Sequence[str]
    logprobs: bool = False
    echoes: Sequence[str] = ()


def chunk(value: str, finish: str = "null", index: int = 0, logprobs: str = "null") -> str:
    return f'{{"index":{index},"text":{value},"logprobs":{logprobs},"finish_reason":{finish}}}'


HI = (
    '{"tokens":["Hi"],"token_logprobs":[-0.25],'
    '"top_logprobs":[{"Hi":-0.25,"你":-1.5}],"text_offset":[0]}'
)
HALVES = (
    '{"tokens":["bytes:\\\\xf0\\\\x9f","bytes:\\\\x91\\\\xa9","!"],'
    '"token_logprobs":[-0.5,-9999.0,0.0],'
    '"top_logprobs":[{"bytes:\\\\xf0\\\\x9f":-0.5},'
    '{"a":-0.125,"bytes:\\\\x91\\\\xa9":-9999.0},{"!":0.0}],"text_offset":[2,2,3]}'
)
BOTH = (
    '{"tokens":["Hi","bytes:\\\\xf0\\\\x9f","bytes:\\\\x91\\\\xa9","!"],'
    '"token_logprobs":[-0.25,-0.5,-9999.0,0.0],'
    '"top_logprobs":[{"Hi":-0.25,"你":-1.5},{"bytes:\\\\xf0\\\\x9f":-0.5},'
    '{"a":-0.125,"bytes:\\\\x91\\\\xa9":-9999.0},{"!":0.0}],"text_offset":[0,2,2,3]}'
)
NO_TOKENS = '{"tokens":[],"token_logprobs":[],"top_logprobs":[],"text_offset":[]}'

WIRE = {
    "one choice": Wire(
        [[text("Hel")], [text("")], [text("lo")], [end()]],
        [chunk('"Hel"'), chunk('"lo"'), chunk('""', '"stop"')],
        [chunk('"Hello"', '"stop"')],
    ),
    "text and end in one delta": Wire(
        [[end("length", value="Hi")]], [chunk('"Hi"', '"length"')], [chunk('"Hi"', '"length"')]
    ),
    "no text at all": Wire([[end()]], [chunk('""', '"stop"')], [chunk('""', '"stop"')]),
    "two choices, ends apart": Wire(
        [[text("a", 1), text("b", 0)], [end("stop", 1)], [end("length", 0, "c")]],
        [
            chunk('"a"', index=1),
            chunk('"b"'),
            chunk('""', '"stop"', 1),
            chunk('"c"', '"length"'),
        ],
        [chunk('"bc"', '"length"'), chunk('"a"', '"stop"', 1)],
    ),
    "characters with a meaning in JSON or SSE": Wire(
        [[text('"\\\n\ndata: [DONE]\0')], [end(value="\x85\u2028</script>")]],
        [
            chunk('"\\"\\\\\\n\\ndata: [DONE]\\u0000"'),
            chunk('"\\u0085\\u2028</script>"', '"stop"'),
        ],
        [chunk('"\\"\\\\\\n\\ndata: [DONE]\\u0000\\u0085\\u2028</script>"', '"stop"')],
    ),
    "echo": Wire(
        [[text(" b", 1)], [end(index=1)], [end(value=" a")]],
        [
            chunk('"A"'),
            chunk('"B\\n"', index=1),
            chunk('" b"', index=1),
            chunk('""', '"stop"', 1),
            chunk('" a"', '"stop"'),
        ],
        [chunk('"A a"', '"stop"'), chunk('"B\\n b"', '"stop"', 1)],
        echoes=["A", "B\n"],
    ),
    "logprobs": Wire(
        [
            [text("Hi", logprobs=[position(b"Hi", -0.25, (b"Hi", -0.25), ("你".encode(), -1.5))])],
            [
                text(
                    "\N{WOMAN}!",
                    logprobs=[
                        position(b"\xf0\x9f", -0.5),
                        position(b"\x91\xa9", float("-inf"), (b"a", -0.125)),
                        position(b"!", 0.1),
                    ],
                )
            ],
            [end()],
        ],
        [
            chunk('"Hi"', logprobs=HI),
            chunk('"\N{WOMAN}!"', logprobs=HALVES),
            chunk('""', '"stop"'),
        ],
        [chunk('"Hi\N{WOMAN}!"', '"stop"', logprobs=BOTH)],
        logprobs=True,
    ),
    "logprobs of no token": Wire(
        [[end()]], [chunk('""', '"stop"')], [chunk('""', '"stop"', logprobs=NO_TOKENS)], True
    ),
    "logprobs that nobody asked for": Wire(
        [[text("Hi", logprobs=[position(b"Hi", -0.25)])], [end()]],
        [chunk('"Hi"'), chunk('""', '"stop"')],
        [chunk('"Hi"', '"stop"')],
    ),
}
each_wire = pytest.mark.parametrize("wire", WIRE.values(), ids=WIRE.keys())


def written(wire: Wire, *, usage: bool = False, obfuscation: bool = False) -> bytes:
    writer = CompletionWriter(
        HEAD, usage=usage, logprobs=wire.logprobs, obfuscation=obfuscation, echoes=wire.echoes
    )
    events = [writer.begin(len(wire.choices)), *map(writer.deltas, wire.updates)]
    return b"".join([*events, writer.usage(USAGE) if usage else b"", DONE])


def body(wire: Wire) -> bytes:
    collector = CompletionCollector(len(wire.choices), echoes=wire.echoes)
    for update in wire.updates:
        collector.add(update)
    return collector.body(HEAD, USAGE, logprobs=wire.logprobs, metadata=None)


@each_wire
def test_written_bytes(wire: Wire) -> None:
    events = [b"data: " + FIELDS + each.encode() + b"]}\n\n" for each in wire.chunks]
    assert written(wire) == b"".join([*events, DONE])


@each_wire
def test_written_bytes_with_usage(wire: Wire) -> None:
    events = [b"data: " + FIELDS + each.encode() + b'],"usage":null}\n\n' for each in wire.chunks]
    last = b"data: " + FIELDS + f'],"usage":{USAGE_JSON}}}\n\n'.encode()
    assert written(wire, usage=True) == b"".join([*events, last, DONE])


@each_wire
def test_the_one_body(wire: Wire) -> None:
    choices = ",".join(wire.choices)
    assert body(wire) == FIELDS + f'{choices}],"usage":{USAGE_JSON}}}'.encode()


@each_wire
def test_both_are_the_sdks_and_say_the_same(wire: Wire) -> None:
    answer = Completion.model_validate_json(body(wire), strict=True)
    assert not answer.model_extra
    texts = {choice.index: "" for choice in answer.choices}
    reasons: dict[int, list[str]] = {choice.index: [] for choice in answer.choices}
    *events, done = SseReader().read(written(wire))
    assert done == "[DONE]"
    for event in events:
        streamed = Completion.construct(**json.loads(event))
        assert not streamed.model_extra
        assert streamed.object == "text_completion"
        (choice,) = streamed.choices
        assert not choice.model_extra
        assert reasons[choice.index] == [], "nothing follows the end of a choice"
        texts[choice.index] += choice.text
        reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    assert texts == {choice.index: choice.text for choice in answer.choices}
    assert reasons == {choice.index: [choice.finish_reason] for choice in answer.choices}


@each_wire
def test_padding_hides_the_length_of_the_text(wire: Wire) -> None:
    for event in SseReader().read(written(wire, obfuscation=True))[:-1]:
        told = json.loads(event)
        raw = event[event.index('"text":') + 7 : event.index(',"logprobs":')]
        assert (len(raw.encode()) + len(told["obfuscation"])) % 32 == 0


def test_what_is_logged_is_what_was_generated() -> None:
    collector = CompletionCollector(2, echoes=["A", "B"])
    collector.add([text("a", 0), text("b", 1)])
    assert collector.texts == ["a", "b"]


@settings(deadline=None)
@given(st.text(max_size=12), st.data())
def test_offsets_are_where_the_tokens_begin(whole: str, data: Any) -> None:
    """Whatever tokens a text is cut into, within characters too."""
    encoded = whole.encode()
    offsets = TextOffsets()
    start = 0
    while start < len(encoded):
        size = data.draw(st.integers(1, 5))
        token = encoded[start : start + size]
        ends = len(encoded[:start].decode(errors="ignore"))
        assert offsets.next(token) == ends
        start += size


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.text(max_size=8)), max_size=12),
    st.lists(st.text(max_size=8), min_size=3, max_size=3) | st.just([]),
    st.booleans(),
    st.booleans(),
)
def test_stream_and_body_are_one_text(
    said: list[tuple[int, str]], echoes: list[str], usage: bool, obfuscation: bool
) -> None:
    writer = CompletionWriter(
        HEAD, usage=usage, logprobs=False, obfuscation=obfuscation, echoes=echoes
    )
    collector = CompletionCollector(3, echoes=echoes)
    data = writer.begin(3)
    for index, value in said:
        data += writer.deltas([text(value, index)])
        collector.add([text(value, index)])
    lines = httpx.Response(200, content=data + DONE).iter_lines()
    *events, _ = [line.removeprefix("data: ") for line in lines if line]
    texts = {0: "", 1: "", 2: ""}
    for event in events:
        (choice,) = json.loads(event)["choices"]
        texts[choice["index"]] += choice["text"]
    answer = json.loads(collector.body(HEAD, Usage(0), logprobs=False, metadata=None))
    assert [choice["text"] for choice in answer["choices"]] == [*texts.values()]
    told = ["".join(value for at, value in said if at == index) for index in range(3)]
    assert [a + b for a, b in zip(echoes or [""] * 3, told, strict=True)] == [*texts.values()]


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(min_size=1, max_size=4), st.floats()), max_size=8))
def test_logprobs_are_finite_json_whatever_comes(tokens: list[tuple[bytes, float]]) -> None:
    made = [PositionLogprobs(TokenLogprob(*token), ()) for token in tokens]
    collector = CompletionCollector(1)
    collector.add([text("x", logprobs=made)])
    raw = collector.body(HEAD, Usage(0), logprobs=True, metadata=None)
    told = json.loads(raw, parse_constant=pytest.fail)["choices"][0]["logprobs"]
    assert len({len(values) for values in told.values()}) == 1
    assert all(-9999.0 <= value <= 0 for value in told["token_logprobs"])
