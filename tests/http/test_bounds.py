"""What one connection may cost: bytes of its head, chunks, time to send, time to read."""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator

import pytest
import uvloop

from ochat_serve import server
from ochat_serve.app import create_app
from ochat_serve.generation import Delta, Update
from ochat_serve.http_bounds import MAX_CHUNKS, MAX_HEAD_BYTES, MAX_HEADERS, Bounds, Deadline
from ochat_serve.http_protocol import HttpProtocol
from ochat_serve.request_log import RequestRecord
from ochat_serve.settings import Settings
from tests.fakes import ScriptedEngine, Wait, serving, words
from tests.live import LiveServer, RawClient, eventually, live

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "one two"}]}
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: a\r\n"
POST = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n".encode()
QUICK = Bounds(header_timeout_s=0.2, read_timeout_s=0.4, write_timeout_s=0.4)
PIECE = "x" * 8_000
Loop = Callable[[], asyncio.AbstractEventLoop]


class Records:
    """``request_log.Log`` in memory."""

    content = False

    def __init__(self) -> None:
        self.kept: list[RequestRecord] = []
        self.write = self.kept.append

    def close(self) -> None:
        pass


@contextlib.contextmanager
def bounded(
    bounds: Bounds,
    engine: ScriptedEngine | None = None,
    loop: Loop = asyncio.new_event_loop,
) -> Iterator[tuple[LiveServer, list[RequestRecord]]]:
    records = Records()
    settings = Settings(allowed_hosts=("*",))
    app = create_app(settings, serving(engine or ScriptedEngine()), records)
    with live(app, HttpProtocol.within(bounds), new_loop=loop) as running:
        yield running, records.kept


@pytest.fixture(scope="module")
def usual() -> Iterator[LiveServer]:
    with bounded(Bounds()) as (running, _):
        yield running


@pytest.fixture(scope="module")
def quick() -> Iterator[LiveServer]:
    with bounded(QUICK) as (running, _):
        yield running


def answer(port: int, request: bytes) -> tuple[int, dict[str, object]]:
    """Status and OpenAI's error of a connection that is closed after it."""
    with RawClient(port) as client:
        client.send(request)
        return refusal(client)


def refusal(client: RawClient) -> tuple[int, dict[str, object]]:
    head, _, body = everything(client).partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]


def everything(client: RawClient) -> bytes:
    """All that comes until the connection is closed."""
    with pytest.raises(ConnectionError):
        client.read_until(b"no server says this")
    return bytes(client.received)


# The head


def padded(size: int) -> bytes:
    """A request whose target and headers have exactly ``size`` bytes."""
    fixed = len("/livez") + len("Host") + len("a") + len("x")
    return LIVEZ + b"x: " + b"y" * (size - fixed) + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "numbers"),
    [
        (padded(MAX_HEAD_BYTES + 1), (MAX_HEAD_BYTES + 1, MAX_HEAD_BYTES)),
        (padded(200_000), (MAX_HEAD_BYTES,)),
        (LIVEZ + b"x: " + b"y" * 200_000, (MAX_HEAD_BYTES,)),
        (b"GET /" + b"x" * 200_000, (MAX_HEAD_BYTES,)),
        (LIVEZ + b"x: y\r\n" * MAX_HEADERS + b"\r\n", (MAX_HEADERS + 1, MAX_HEADERS)),
        (LIVEZ + b"a:\r\n" * 60_000 + b"\r\n", (MAX_HEAD_BYTES,)),
    ],
    ids=["one byte", "complete", "incomplete", "target", "one header", "many headers"],
)
def test_a_head_that_is_too_large_is_431(
    usual: LiveServer, request_bytes: bytes, numbers: tuple[int, ...]
) -> None:
    status, error = answer(usual.port, request_bytes)
    assert status == 431
    assert error["type"] == "invalid_request_error"
    assert all(str(number) in str(error["message"]) for number in numbers)


@pytest.mark.parametrize(
    "request_bytes",
    [padded(MAX_HEAD_BYTES), LIVEZ + b"x: y\r\n" * (MAX_HEADERS - 1) + b"\r\n"],
    ids=["bytes", "headers"],
)
def test_the_largest_head_is_fine(usual: LiveServer, request_bytes: bytes) -> None:
    with RawClient(usual.port) as client:
        client.send(request_bytes)
        assert client.read_until(b"alive").startswith(b"HTTP/1.1 200")


def chunked(body: bytes, chunks: int) -> bytes:
    """The body's first bytes one by one, the rest at once."""
    pieces = [body[at : at + 1] for at in range(chunks - 1)] + [body[chunks - 1 :]]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return POST + b"Transfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n"


def test_a_body_may_come_in_many_chunks_but_not_in_any_number(usual: LiveServer) -> None:
    body = json.dumps(ASK).encode() + b" " * MAX_CHUNKS
    with RawClient(usual.port) as client:
        for _ in range(2):  # each request anew
            client.received.clear()
            client.send(chunked(body, MAX_CHUNKS) + b"\r\n")
            assert client.read_until(b'"usage"').startswith(b"HTTP/1.1 200")
    status, error = answer(usual.port, chunked(body, MAX_CHUNKS + 1) + b"\r\n")
    assert (status, error["message"]) == (
        400,
        f"The body comes in more than {MAX_CHUNKS} chunks.",
    )


def test_headers_after_a_body_are_bounded(usual: LiveServer) -> None:
    with RawClient(usual.port) as client:
        client.send(chunked(b"{", 1))
        client.send(b"a:\r\n" * 20_000 + b"\r\n")  # at once, or h11 would notice
        assert refusal(client)[0] == 431


def test_bad_bytes_after_an_answer_only_close_the_connection(usual: LiveServer) -> None:
    """The body of a request that was answered without being read."""
    with RawClient(usual.port) as client:
        client.send(b"POST /nowhere HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.read_until(b"}}")
        client.send(b"this is no chunk\r\n")
        assert everything(client).count(b"HTTP/1.1") == 1


def test_what_is_no_http_writes_no_line(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Else anybody fills the terminal."""
    with bounded(Bounds()) as (running, _):  # from here on uvicorn's loggers are configured
        assert answer(running.port, b"this is no HTTP\r\n\r\n")[0] == 400
        offer = b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
        with RawClient(running.port) as client:
            client.send(LIVEZ + offer)
            client.read_until(b"alive")
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_a_bug_behind_the_protocol_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: object, receive: object, send: object) -> None:
        raise RuntimeError("this is the bug")

    with live(broken, HttpProtocol) as running, RawClient(running.port) as client:
        client.send(LIVEZ + b"\r\n")
        assert client.read_until(b"Error").startswith(b"HTTP/1.1 500")
    assert "this is the bug" in caplog.text


def test_another_protocol_is_not_switched_to(usual: LiveServer) -> None:
    offer = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    with RawClient(usual.port) as client:
        client.send(LIVEZ + offer + b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
        assert client.read_until(b"alive").startswith(b"HTTP/1.1 200")


# Slow senders


@pytest.mark.parametrize("begun", [LIVEZ, b"G", LIVEZ + b"\r\n" + LIVEZ], ids=len)
def test_a_head_that_comes_too_slowly_is_408(quick: LiveServer, begun: bytes) -> None:
    with RawClient(quick.port) as client:
        for byte in begun:
            client.send(bytes([byte]))
            time.sleep(0.001)
        received = everything(client)
    *answered, (head, body) = [part.split(b"\r\n\r\n") for part in received.split(b"HTTP/1.1 ")[1:]]
    assert len(answered) == begun.count(b"\r\n\r\n")
    assert head.startswith(b"408 Request Timeout\r\n")
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "request_timeout")


def test_a_body_that_was_announced_ahead_must_come_in_time_as_well(quick: LiveServer) -> None:
    """Its head came with the request before it, so no byte of its own starts its clock."""
    with RawClient(quick.port) as client:
        client.send(LIVEZ + b"\r\n" + POST + b"Content-Length: 50\r\n\r\n")
        assert b"HTTP/1.1 408" in everything(client)


def drips(client: RawClient, piece: bytes) -> bool:
    """Whether the server puts up with a piece every moment for many times its patience."""
    with contextlib.suppress(OSError):
        for _ in range(200):
            client.send(piece)
            time.sleep(0.02)
        return True
    return False


def test_dripping_does_not_help(quick: LiveServer) -> None:
    """The time counts from the first byte, not from the last."""
    with RawClient(quick.port) as client:
        client.send(LIVEZ)
        assert not drips(client, b"x: y\r\n")


def test_whoever_asks_nothing_is_told_nothing(quick: LiveServer) -> None:
    """A browser opens connections ahead of need, and would take it for its answer."""
    with RawClient(quick.port) as client:
        assert everything(client) == b""


def test_a_body_that_comes_too_slowly_is_408_and_reaches_no_engine() -> None:
    engine = ScriptedEngine()
    with bounded(QUICK, engine) as (running, records):
        with RawClient(running.port) as client:
            client.send(POST + b"Content-Length: 100\r\n\r\n{")
            status, error = refusal(client)
        assert eventually(lambda: records)
    assert (status, error["code"]) == (408, "request_timeout")
    assert "0.4 seconds" in str(error["message"])
    assert (records[0].outcome, records[0].status) == ("abandoned", None)
    assert engine.requests == []


def test_a_body_that_nobody_reads_must_end_as_well(quick: LiveServer) -> None:
    with RawClient(quick.port) as client:
        client.send(b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
        client.read_until(b"}}")
        assert not drips(client, b"x")


def test_a_long_answer_is_not_a_slow_request() -> None:
    wait = Wait()
    with (
        bounded(QUICK, ScriptedEngine(script=[wait, *words("late")])) as (running, _),
        RawClient(running.port) as client,
    ):
        client.post(CHAT, json.dumps(ASK).encode())
        time.sleep(3 * QUICK.read_timeout_s)
        running.loop.call_soon_threadsafe(wait.go.set)
        assert b"late" in client.read_until(b'"usage"')


# Slow readers, on the loop of the server and on the tests'

LOOPS = pytest.mark.parametrize("loop", [uvloop.new_event_loop, asyncio.new_event_loop])


def is_reset(client: RawClient) -> bool:
    """Closed without waiting for the client to read."""
    with contextlib.suppress(TimeoutError):
        try:
            while client._socket.recv(65536):
                pass
        except ConnectionResetError:
            return True
    return False


@LOOPS
@pytest.mark.parametrize("ended", [True, False], ids=["ended", "going on"])
def test_a_stream_that_is_not_read_is_cut_and_its_place_is_free(loop: Loop, ended: bool) -> None:
    script = [Update([Delta(0, PIECE, 1)]) for _ in range(600)]
    engine = ScriptedEngine(script=[*script, *(words("end") if ended else [Wait()])])
    with bounded(QUICK, engine, loop) as (running, records):
        with RawClient(running.port, receive_buffer=4_096) as client:
            client.post(CHAT, json.dumps({**ASK, "stream": True}).encode())
            assert eventually(lambda: records)
            assert engine.running == 0
            assert running.connections == 0
            assert is_reset(client)
        assert (records[0].outcome, records[0].status) == ("abandoned", 200)


@LOOPS
def test_a_whole_answer_that_is_not_read_is_dropped(loop: Loop) -> None:
    engine = ScriptedEngine(script=words(*[PIECE] * 600))
    with (
        bounded(QUICK, engine, loop) as (running, _),
        RawClient(running.port, receive_buffer=4_096) as client,
    ):
        client.post(CHAT, json.dumps(ASK).encode())
        assert eventually(lambda: engine.requests)
        assert eventually(lambda: engine.running == 0)
        assert eventually(lambda: running.connections == 0)
        assert is_reset(client)


@LOOPS
@pytest.mark.parametrize("said", ["close", "keep-alive"])
def test_closing_does_not_wait_for_who_does_not_read(loop: Loop, said: str) -> None:
    """An answer too small to stop the writing, too large for the kernel; ``close`` would wait."""
    engine = ScriptedEngine(script=words(*[PIECE] * 14))
    with bounded(QUICK, engine, loop) as (running, _):
        running._server.config.timeout_keep_alive = 0.1
        with RawClient(running.port, receive_buffer=4_096) as client:
            body = json.dumps(ASK).encode()
            client.post(CHAT, body, "Content-Type: application/json", f"Connection: {said}")
            assert eventually(lambda: engine.requests)
            assert eventually(lambda: running.connections == 0)
            assert is_reset(client)


@LOOPS
def test_a_slow_reader_that_reads_is_not_dropped(loop: Loop) -> None:
    """Reading what stops the writing (some 48 KiB) takes it longer than the server's patience."""
    pieces, pause_s = 40, 0.02
    engine = ScriptedEngine(script=words(*[PIECE] * pieces))
    with (
        bounded(QUICK, engine, loop) as (running, records),
        RawClient(running.port, receive_buffer=4_096) as client,
    ):
        client.post(CHAT, json.dumps({**ASK, "stream": True}).encode())
        while b"[DONE]" not in client.received[-8_192:]:
            client.received += client._socket.recv(2_048)
            time.sleep(pause_s)
        assert client.received.count(PIECE.encode()) == pieces
        assert eventually(lambda: records)
    assert records[0].outcome == "finished"


@LOOPS
def test_the_kernel_holds_little_of_what_is_not_read(loop: Loop) -> None:
    """Else it takes megabytes, which count for nobody."""
    script = [Update([Delta(0, PIECE, 1)]) for _ in range(2_000)]
    engine = ScriptedEngine(script=[*script, Wait()])
    with (
        bounded(Bounds(), engine, loop) as (running, _),
        RawClient(running.port, receive_buffer=4_096) as client,
    ):
        client.post(CHAT, json.dumps({**ASK, "stream": True}).encode())
        assert eventually(lambda: engine.generations and engine.generations[0].waiting > 1_900)


async def test_a_deadline_that_runs_is_not_put_off() -> None:
    missed: list[str] = []
    deadline = Deadline(asyncio.get_running_loop())
    deadline.start(0, lambda: missed.append("first"))
    deadline.start(0, lambda: missed.append("second"))
    await asyncio.sleep(0.01)
    deadline.start(0, lambda: missed.append("third"))
    deadline.stop()
    await asyncio.sleep(0.01)
    assert missed == ["first"]


# Connections


def test_more_connections_than_the_most_are_503() -> None:
    with bounded(Bounds(max_connections=3)) as (running, _):
        with contextlib.ExitStack() as held:
            clients = [held.enter_context(RawClient(running.port)) for _ in range(3)]
            assert eventually(lambda: running.connections == 3)
            with RawClient(running.port) as another:
                status, error = refusal(another)
            assert (status, error["code"]) == (503, "overloaded")
            clients[0].send(LIVEZ + b"\r\n")
            assert b"alive" in clients[0].read_until(b"alive")
        assert eventually(lambda: running.connections == 0)
        with RawClient(running.port) as client:
            client.send(LIVEZ + b"\r\n")
            client.read_until(b"alive")


def test_the_settings_become_the_bounds() -> None:
    settings = Settings(read_timeout_s=5, write_timeout_s=7, max_connections=9)
    assert server.bounds(settings) == Bounds(5, 5, 7, 9)
    assert server.bounds(Settings()).header_timeout_s == 10


def test_there_are_never_more_connections_than_open_files() -> None:
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    settings = Settings(max_connections=65_536)
    assert server.bounds(settings).max_connections <= max(1, files - server.OTHER_FILES)
