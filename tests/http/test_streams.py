"""How events reach the socket: both roads, slow readers, and how tokens of many streams merge."""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator

import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from ochat_serve.app import create_app
from ochat_serve.errors import ServerFault
from ochat_serve.generation import Delta, Update
from ochat_serve.http_protocol import HttpProtocol
from ochat_serve.routes import event_stream
from ochat_serve.routes.event_stream import OpenStreams
from ochat_serve.settings import Settings
from tests.fakes import ScriptedEngine, Wait, serving, words
from tests.live import LiveServer, RawClient, eventually, live

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "one two"}], "stream": True}
# Our own protocol, which hands out its connection; and any other ASGI server.
ROADS = pytest.mark.parametrize("protocol", [HttpProtocol, H11Protocol])


@contextlib.contextmanager
def asked(
    engine: ScriptedEngine, protocol: type, settings: Settings | None = None
) -> Iterator[tuple[LiveServer, RawClient]]:
    """A server that was asked for a stream."""
    app = create_app(settings or Settings(), serving(engine))
    with live(app, protocol) as server, RawClient(server.port) as client:
        client.post(CHAT, json.dumps(ASK).encode())
        yield server, client


def contents(received: bytes) -> list[str]:
    lines = received.decode().splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith('data: {"id"')]
    return [c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"]]


@ROADS
def test_every_update_is_an_event_and_the_connection_lives_on(protocol: type) -> None:
    texts = ["One", " two", " \N{CROISSANT}", " four"]
    with asked(ScriptedEngine(script=words(*texts)), protocol) as (_, client):
        first = client.read_until(b"0\r\n\r\n")
        assert contents(first) == ["", *texts, ""]
        client.received.clear()
        client.post(CHAT, json.dumps(ASK).encode())
        assert contents(client.read_until(b"0\r\n\r\n")) == ["", *texts, ""]


@ROADS
def test_chunks_are_framed_as_http_says(protocol: type) -> None:
    with asked(ScriptedEngine(script=words(*"abcdef")), protocol) as (_, client):
        received = client.read_until(b"\r\n0\r\n\r\n")
    head, _, rest = received.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    body = b""
    while rest != b"0\r\n\r\n":
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body, rest = body + rest[:length], rest[length + 2 :]
    assert body.endswith(b"data: [DONE]\n\n")


@ROADS
def test_an_old_client_gets_a_body_without_chunks(protocol: type) -> None:
    body = json.dumps(ASK).encode()
    engine = ScriptedEngine(script=words("a", "b", "c"))
    head = f"POST {CHAT} HTTP/1.0\r\nContent-Type: application/json\r\n"
    with (
        live(create_app(Settings(), serving(engine)), protocol) as server,
        RawClient(server.port) as client,
    ):
        client.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        received = client.read_until(b"[DONE]\n\n")
    assert b"chunked" not in received.lower()
    assert b"\r\n\r\ndata: {" in received
    assert contents(received) == ["", "a", "b", "c", ""]


@ROADS
@pytest.mark.parametrize("error", [ServerFault(), KeyError("secret")])
def test_an_error_in_a_stream_is_its_last_event(protocol: type, error: Exception) -> None:
    begun = [Update([Delta(0, "a", 1)]), Update([Delta(0, "b", 1)])]
    engine = ScriptedEngine(script=[*begun, error])
    with asked(engine, protocol) as (_, client):
        received = client.read_until(b"data: [DONE]\n\n").decode()
    assert contents(received.encode()) == ["", "a", "b"]
    assert '"type":"server_error"' in received
    assert "secret" not in received
    assert engine.running == 0


@ROADS
def test_silence_within_an_answer_is_filled_with_comments(protocol: type) -> None:
    wait = Wait()
    begun = [Update([Delta(0, "a", 1)]), Update([Delta(0, "b", 1)])]
    engine = ScriptedEngine(script=[*begun, wait, *words("c")])
    settings = Settings(ping_interval_s=0.1)
    with asked(engine, protocol, settings) as (server, client):
        client.read_until(b": ping\n\n")
        server.loop.call_soon_threadsafe(wait.go.set)
        assert contents(client.read_until(b"[DONE]"))[-2:] == ["c", ""]


@ROADS
def test_leaving_in_the_middle_frees_the_slot(protocol: type) -> None:
    engine = ScriptedEngine(script=[*(Update([Delta(0, "a", 1)]) for _ in range(3)), Wait()])
    with asked(engine, protocol) as (_, client):
        client.read_until(b'"content":"a"')
        client.hang_up()
        assert eventually(lambda: engine.running == 0, within_s=2)


def test_the_end_of_one_request_takes_nothing_from_the_next() -> None:
    engine = ScriptedEngine(script=words("Hi"))
    with asked(engine, HttpProtocol) as (_, client):
        client.read_until(b"0\r\n\r\n")
        client.received.clear()
        engine.script = [Update([Delta(0, "a", 1)]), Wait()]
        client.post(CHAT, json.dumps(ASK).encode())
        client.read_until(b'"content":"a"')
        client.hang_up()
        assert eventually(lambda: engine.running == 0)


def test_whoever_has_read_the_end_may_ask_again_at_once() -> None:
    """The engine has been told and the place is free before the last bytes are sent."""
    engine = ScriptedEngine(script=words("Hi", "!"), ends=Wait())
    with asked(engine, HttpProtocol) as (server, client):
        client.read_until(b'"content":"Hi"')
        assert eventually(lambda: engine.generations and engine.generations[0].finished)
        time.sleep(0.1)
        assert b"[DONE]" not in client.received
        assert engine.running == 1
        server.loop.call_soon_threadsafe(engine.ends.go.set)
        client.read_until(b"0\r\n\r\n")
        assert engine.running == 0


def settled(value: Callable[[], int]) -> int:
    """What ``value()`` is when it no longer changes."""
    seen = [-1]

    def stays() -> bool:
        seen.append(value())
        time.sleep(0.2)
        return seen[-1] == seen[-2]

    assert eventually(stays)
    return seen[-1]


def test_a_slow_reader_loses_nothing_and_holds_up_nobody() -> None:
    """What it does not read is not written, and waits in the engine."""
    pieces = [f"{number:05d}" + "x" * 8_000 for number in range(2_000)]
    engine = ScriptedEngine(script=words(*pieces))
    app = create_app(Settings(), serving(engine))
    with live(app) as server, RawClient(server.port, receive_buffer=4_096) as client:
        client.post(CHAT, json.dumps(ASK).encode())
        assert eventually(lambda: engine.generations)
        assert settled(lambda: engine.generations[0].waiting) > len(pieces) / 4
        with RawClient(server.port) as other:
            engine.script = words("quick")
            other.post(CHAT, json.dumps(ASK).encode())
            assert b"quick" in other.read_until(b"[DONE]")
        assert contents(client.read_until(b"[DONE]"))[1:-1] == pieces


class Recorded:
    """A stream that only notes when it was told to write."""

    def __init__(self, streams: OpenStreams) -> None:
        self.last_sent = streams.clock()
        self.flushed: list[float] = []

    def flush(self, now: float) -> None:
        self.last_sent = now
        self.flushed.append(now)

    def ping(self) -> None:
        raise AssertionError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def opened(count: int, *, merges: bool) -> tuple[Clock, OpenStreams, list[Recorded]]:
    clock = Clock()
    streams = OpenStreams(10, clock, merges=merges)
    recorded = [Recorded(streams) for _ in range(count)]
    for stream in recorded:
        streams.add(stream)  # type: ignore[arg-type]
    return clock, streams, recorded


async def step(streams: OpenStreams, recorded: list[Recorded]) -> None:
    """Every stream has news at once, as after a step of the engine."""
    for stream in recorded:
        streams.ready(stream)  # type: ignore[arg-type]
    await asyncio.sleep(0)
    await asyncio.sleep(0)


@pytest.mark.parametrize(("count", "merges"), [(1, True), (20, True), (1_000, False)])
async def test_few_streams_write_every_token(count: int, merges: bool) -> None:
    clock, streams, recorded = opened(count, merges=merges)
    for _ in range(3):
        clock.now += 0.004
        await step(streams, recorded)
    assert all(len(stream.flushed) == 3 for stream in recorded)


async def test_many_streams_wait_for_their_gap_and_no_longer() -> None:
    clock, streams, recorded = opened(1_000, merges=True)
    assert streams.gap_s == event_stream.MAX_GAP_S
    clock.now += 0.025
    await step(streams, recorded)
    assert not any(stream.flushed for stream in recorded)
    clock.now += 0.025
    await asyncio.sleep(event_stream.MAX_GAP_S)  # the timer's time is the loop's
    assert all(stream.flushed == [clock.now] for stream in recorded)
    # Nearly due is due: no stream waits for a step that comes a moment too late.
    clock.now += 0.046
    await step(streams, recorded)
    assert all(len(stream.flushed) == 2 for stream in recorded)


async def test_the_earliest_decides_whoever_came_first() -> None:
    clock, streams, (late, early, *_) = opened(1_000, merges=True)
    clock.now += 0.010
    early.last_sent = clock.now - 0.030
    late.last_sent = clock.now
    await step(streams, [late])
    await step(streams, [early])
    clock.now += 0.021
    await asyncio.sleep(0.03)
    assert early.flushed
    assert not late.flushed


def test_the_gap_grows_with_the_streams_and_is_bounded() -> None:
    gaps = [opened(count, merges=True)[1].gap_s for count in (0, 1, 50, 100, 250, 10_000)]
    assert gaps == sorted(gaps)
    assert gaps[0] == 0
    assert gaps[3] == pytest.approx(100 / event_stream.EVENTS_PER_S)
    assert gaps[-1] == event_stream.MAX_GAP_S == 0.05
