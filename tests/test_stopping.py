"""What a signal does to a server that is answering: the first drains it, the second ends it."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from ochat_serve.http_server import HURRY, HttpServer
from tests.fakes import ScriptedEngine, serving
from tests.live import RawClient, eventually
from tests.process import ServerProcess, alive

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "one two"}]}
STREAM = json.dumps({**ASK, "stream": True}).encode()
BODY = json.dumps(ASK).encode()
END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
BOTH = pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])


@contextlib.contextmanager
def scripted(folder: Path, *arguments: str) -> Iterator[ServerProcess]:
    """With ``--log-file requests.log`` in the folder."""
    server = ServerProcess(
        *arguments,
        "--log-file",
        str(folder / "requests.log"),
        output=folder / "output.txt",
        module="tests.scripted_server",
    )
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.end()


def begun_stream(server: ServerProcess) -> RawClient:
    client = RawClient(server.port)
    client.post(CHAT, STREAM)
    client.read_until(b'"content":"Hel"')
    return client


def waiting_body(server: ServerProcess) -> RawClient:
    client = RawClient(server.port)
    client.post(CHAT, BODY)
    assert eventually(lambda: httpx.get(server.url + "/running").json() == 1)
    return client


def log(folder: Path) -> list[tuple[object, ...]]:
    lines = map(json.loads, (folder / "requests.log").read_text().splitlines())
    return [(line["status"], line["outcome"], line.get("error")) for line in lines]


def is_draining(server: ServerProcess) -> bool:
    return httpx.get(server.url + "/readyz").json()["status"] == "draining"


@BOTH
def test_a_drain_answers_new_requests_and_lets_the_open_ones_finish(
    tmp_path: Path, sig: signal.Signals
) -> None:
    with scripted(tmp_path) as server:
        streams = [begun_stream(server) for _ in range(3)]
        server.process.send_signal(sig)
        assert eventually(lambda: is_draining(server))
        ready = httpx.get(server.url + "/readyz")
        chat = httpx.post(server.url + CHAT, json=ASK)
        assert httpx.get(server.url + "/livez").status_code == 200
        assert httpx.get(server.url + "/metrics").status_code == 200
        httpx.post(server.url + "/release")
        for stream in streams:
            received = stream.read_until(END)
            assert b'"content":"lo"' in received
            assert b"error" not in received
            stream.hang_up()
        assert server.process.wait(20) == 0
    for answer in (ready, chat):
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        assert answer.headers["connection"] == "close"
    assert chat.json()["error"]["code"] == "draining"
    assert log(tmp_path) == [(503, "rejected", "draining"), *[(200, "finished", None)] * 3]


def test_without_requests_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    with scripted(tmp_path, "--drain-s", "600") as server, RawClient(server.port) as idle:
        idle.post("/nowhere", b"")
        idle.read_until(b"}}")  # its connection is kept alive
        time.sleep(0.2)  # the answer is there a moment before its request is over
        assert server.stop() == 0
    assert "draining: 0 requests" in server.output


def test_who_is_not_done_in_time_gets_an_error(tmp_path: Path) -> None:
    with (
        scripted(tmp_path, "--drain-s", "0.5") as server,
        waiting_body(server) as body,
        begun_stream(server) as stream,
    ):
        server.process.terminate()
        assert b'"code":"shutting_down"' in stream.read_until(END)
        refused = body.read_until(b"}}")
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b'"code":"shutting_down"' in refused
        assert server.process.wait(20) == 0
    assert "2 chats were given up" in server.output
    gone = [(200, "shutdown", "shutting_down"), (503, "shutdown", "shutting_down")]
    assert sorted(log(tmp_path)) == gone


@BOTH
def test_a_second_signal_ends_it_now(tmp_path: Path, sig: signal.Signals) -> None:
    with scripted(tmp_path, "--drain-s", "600") as server, begun_stream(server) as stream:
        server.process.send_signal(sig)
        assert eventually(lambda: is_draining(server))
        server.process.send_signal(sig)
        assert b'"code":"shutting_down"' in stream.read_until(END)
        assert server.process.wait(20) == 128 + sig
    assert log(tmp_path) == [(200, "shutdown", "shutting_down")]


@pytest.mark.parametrize("parent", [[], ["--has-parent"]])
def test_a_hangup_reads_files_again_and_stops_nothing(tmp_path: Path, parent: list[str]) -> None:
    with scripted(tmp_path, *parent) as server, begun_stream(server) as stream:
        server.process.send_signal(signal.SIGHUP)
        said = "ochat_serve: SIGHUP: the key file and the certificate are read again\n"
        assert eventually(lambda: said in server.output)
        assert not is_draining(server)
        httpx.post(server.url + "/release")
        assert b'"content":"lo"' in stream.read_until(END)
        assert server.stop() == 0


def test_a_front_end_does_not_count_signals(tmp_path: Path) -> None:
    """Its parent does: a supervisor may send one to every process, and then the parent again."""
    with scripted(tmp_path, "--has-parent") as server, begun_stream(server) as stream:
        server.process.terminate()
        assert eventually(lambda: is_draining(server))
        server.process.terminate()
        httpx.post(server.url + "/release")
        assert b'"content":"lo"' in stream.read_until(END)
        assert server.process.wait(20) == 0


def test_a_front_end_hurries_when_its_parent_says_so(tmp_path: Path) -> None:
    with (
        scripted(tmp_path, "--drain-s", "600", "--has-parent") as server,
        begun_stream(server) as stream,
    ):
        server.process.send_signal(HURRY)
        assert b'"code":"shutting_down"' in stream.read_until(END)
        assert server.process.wait(20) == 128 + HURRY


def test_an_engine_that_does_not_end_is_ended_by_force(tmp_path: Path) -> None:
    with (
        scripted(tmp_path, "--drain-s", "600", "--engine", "unwilling") as server,
        begun_stream(server) as stream,
    ):
        (child,) = server.children()
        server.process.terminate()
        assert eventually(lambda: is_draining(server))
        server.process.terminate()
        assert b'"code":"shutting_down"' in stream.read_until(END)
        assert server.process.wait(30) == 128 + signal.SIGTERM
        assert eventually(lambda: not alive(child))


def test_no_process_of_the_engine_is_left(tmp_path: Path) -> None:
    with scripted(tmp_path, "--engine", "forgetful") as server:
        (child,) = server.children()
        assert server.stop() == 0
        assert eventually(lambda: not alive(child))


@BOTH
def test_a_second_signal_ends_the_engines_process_when_nothing_is_served_any_more(
    tmp_path: Path, sig: signal.Signals
) -> None:
    with scripted(tmp_path, "--engine", "forgetful") as server:
        (child,) = server.children()
        server.process.send_signal(sig)
        assert eventually(lambda: "asked in vain" in server.output)
        server.process.send_signal(sig)
        assert server.process.wait(20) == 128 + sig
        assert eventually(lambda: not alive(child))
    assert "Traceback" not in server.output


@BOTH
def test_a_signal_before_there_is_a_server_ends_it(tmp_path: Path, sig: signal.Signals) -> None:
    config = tmp_path / "config.yaml"
    os.mkfifo(config)
    server = ServerProcess("--config", str(config), output=tmp_path / "output.txt")
    try:
        with config.open("wb"):  # it reads, and nothing comes
            assert server.stop(sig) == 0
    finally:
        server.end()
    assert server.output == ""


@pytest.mark.parametrize("count", [1, 2])
def test_a_signal_while_vllm_is_imported_ends_it(tmp_path: Path, count: int) -> None:
    server = ServerProcess(
        "--model", "demo", "--api-server-count", str(count), output=tmp_path / "output.txt"
    )
    try:
        assert eventually(lambda: "importing vLLM" in server.output, within_s=30)
        assert server.stop() == 0
    finally:
        server.end()
    assert "Traceback" not in server.output


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_a_drain_ends_with_the_last_request_or_with_its_time(capsys: object) -> None:
    clock = Clock()
    state = serving(ScriptedEngine())
    config = uvicorn.Config(lambda *_: None)
    server = HttpServer(config, state, drain_s=30, clock=clock)
    request = object()
    server.server_state.tasks.add(request)  # type: ignore[arg-type]
    assert not await server.on_tick(0)
    clock.now += 1_000
    server.handle_exit(signal.SIGTERM, None)
    assert not await server.on_tick(1)
    clock.now += 29.9
    assert not await server.on_tick(2)
    server.server_state.tasks.clear()
    assert await server.on_tick(3)
    server.server_state.tasks.add(request)  # type: ignore[arg-type]
    assert not await server.on_tick(4)
    clock.now += 0.1
    assert await server.on_tick(5)


async def test_while_loading_a_signal_ends_it() -> None:
    state = serving(ScriptedEngine())
    state.chat = None
    server = HttpServer(uvicorn.Config(lambda *_: None), state, drain_s=30)
    server.handle_exit(signal.SIGTERM, None)
    assert await server.on_tick(1)
    assert server.exit_code == 0
    server.handle_exit(signal.SIGTERM, None)
    assert server.exit_code == 128 + signal.SIGTERM
