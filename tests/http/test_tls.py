"""HTTPS by the server itself, on both event loops: streams, hang-ups, slow readers, renewal."""

import asyncio
import json
import logging
import re
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from ochat_serve.app import create_app
from ochat_serve.event_loop import EventLoop
from ochat_serve.generation import Delta, Update
from ochat_serve.settings import Settings
from ochat_serve.tls import Certificate
from tests.certificates import Authority, Pair
from tests.fakes import ScriptedEngine, Wait, serving, words
from tests.http.test_streams import ASK, CHAT, contents, settled
from tests.live import LiveServer, RawClient, eventually, live
from tests.process import ROOT, free_port
from tests.request_log.files import request_log

BODY = json.dumps(ASK).encode()


@pytest.fixture(params=[asyncio.new_event_loop, EventLoop], ids=["asyncio", "ours"])
def new_loop(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    return request.param


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def pair(authority: Authority) -> Pair:
    return authority.issue("server")


@pytest.fixture
def server(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    engine: ScriptedEngine,
    pair: Pair,
    tmp_path: Path,
) -> Iterator[LiveServer]:
    log = request_log(tmp_path / "requests.log")
    app = create_app(Settings(), serving(engine), log)
    certificate = Certificate(str(pair.certfile), str(pair.keyfile))
    with live(app, closing=(log,), certificate=certificate, new_loop=new_loop) as running:
        yield running


def test_one_connection_carries_streams_and_bodies(
    server: LiveServer, engine: ScriptedEngine, authority: Authority, tmp_path: Path
) -> None:
    texts = ["One", " two", " \N{CROISSANT}", " four"]
    engine.script = words(*texts)
    with RawClient(server.port, tls=authority.context) as client:
        client.post(CHAT, BODY)
        assert contents(client.read_until(b"0\r\n\r\n")) == ["", *texts, ""]
        client.received.clear()
        client.post(CHAT, json.dumps({**ASK, "stream": False}).encode())
        assert "One two \N{CROISSANT} four" in client.read_until(b'"usage"').decode()
        assert len(server.transports) == 1
    with httpx.Client(verify=authority.context) as known:
        assert known.get(server.url + "/readyz").status_code == 200
    log = tmp_path / "requests.log"
    assert eventually(lambda: log.read_text().count("\n") == 2)
    lines = log.read_text().splitlines()
    assert [json.loads(line)["client"] for line in lines] == ["127.0.0.1"] * 2


def test_an_event_is_there_while_the_next_one_is_awaited(
    server: LiveServer, engine: ScriptedEngine, authority: Authority
) -> None:
    waits = [Wait(), Wait()]
    engine.script = [
        Update([Delta(0, "a", 1)]), waits[0], Update([Delta(0, "b", 1)]), waits[1], *words("c"),
    ]  # fmt: skip
    with RawClient(server.port, tls=authority.context) as client:
        client.post(CHAT, BODY)
        client.read_until(b'"content":"a"')
        server.loop.call_soon_threadsafe(waits[0].go.set)
        client.read_until(b'"content":"b"')
        assert b'"content":"c"' not in client.received
        server.loop.call_soon_threadsafe(waits[1].go.set)
        assert contents(client.read_until(b"0\r\n\r\n")) == ["", "a", "b", "c", ""]


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_frees_the_slot(
    server: LiveServer, engine: ScriptedEngine, authority: Authority, stream: bool
) -> None:
    engine.script = [*(Update([Delta(0, "a", 1)]) for _ in range(3)), Wait()]
    with RawClient(server.port, tls=authority.context) as client:
        client.post(CHAT, json.dumps({**ASK, "stream": stream}).encode())
        assert eventually(lambda: engine.running == 1)
    assert eventually(lambda: engine.running == 0, within_s=2)


def test_a_slow_reader_loses_nothing_and_holds_up_nobody(
    server: LiveServer, engine: ScriptedEngine, authority: Authority
) -> None:
    pieces = [f"{number:05d}" + "x" * 8_000 for number in range(2_000)]
    engine.script = words(*pieces)
    with RawClient(server.port, receive_buffer=4_096, tls=authority.context) as client:
        client.post(CHAT, BODY)
        assert eventually(lambda: engine.generations)
        assert settled(lambda: engine.generations[0].waiting) > len(pieces) / 4
        assert server.transports[0].get_write_buffer_size() < 2 * HIGH_WATER_LIMIT
        with RawClient(server.port, tls=authority.context) as other:
            engine.script = words("quick")
            other.post(CHAT, BODY)
            assert b"quick" in other.read_until(b"[DONE]")
        assert contents(client.read_until(b"[DONE]"))[1:-1] == pieces


def test_new_connections_get_the_new_certificate_and_open_streams_live_on(
    server: LiveServer, engine: ScriptedEngine, authority: Authority, pair: Pair
) -> None:
    wait = Wait()
    engine.script = [Update([Delta(0, "a", 1)]), wait, *words("b")]
    old, new = pair.der, authority.issue("new")
    with RawClient(server.port, tls=authority.context) as client:
        client.post(CHAT, BODY)
        client.read_until(b'"content":"a"')
        pair.keyfile.write_bytes(new.keyfile.read_bytes())
        assert eventually(lambda: server.said, within_s=10)
        assert authority.shown_by(server.port) == old, "its key is no longer there"
        pair.certfile.write_bytes(new.certfile.read_bytes())
        assert eventually(lambda: authority.shown_by(server.port) == new.der, within_s=10)
        server.loop.call_soon_threadsafe(wait.go.set)
        assert contents(client.read_until(b"0\r\n\r\n")) == ["", "a", "b", ""]
    assert len(server.said) == 2
    assert "do not belong together" in server.said[0]
    assert engine.generations[0].finished
    assert not engine.closed


def test_what_is_no_tls_is_dropped_without_a_word(
    server: LiveServer, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """Scanners must not fill the terminal."""
    strangers = [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x00\x05hello",
        b"\x00" * 99,
    ]
    with caplog.at_level(logging.WARNING):
        for said in strangers:
            with RawClient(server.port) as client:
                client.send(said)
                with pytest.raises(ConnectionError):
                    client.read_until(b"HTTP/1.1")
        with pytest.raises(ssl.SSLError), RawClient(server.port, tls=ssl.create_default_context()):
            pass
        assert authority.shown_by(server.port) is not None
    assert caplog.records == []


@pytest.mark.parametrize("new_loop", [EventLoop], indirect=True)
def test_a_client_that_says_nothing_is_waited_for_no_longer_than_needed(
    server: LiveServer, authority: Authority
) -> None:
    """Neither for its first word nor for its last one, which an idle client does not say."""
    with RawClient(server.port) as silent, RawClient(server.port, tls=authority.context) as idle:
        idle.post(CHAT, BODY, "Content-Type: application/json", "Connection: close")
        idle.read_until(b"0\r\n\r\n")
        assert len(server.transports) == 1
        # uvloop's own patience is 30 and 60 s.
        assert eventually(lambda: not server.transports, within_s=15)
        with pytest.raises(ConnectionError):
            silent.read_until(b"anything")


def test_the_containers_health_check_speaks_both(server: LiveServer) -> None:
    line = re.search(r"HEALTHCHECK.*\n +CMD (.*)", (ROOT / "Dockerfile").read_text())
    assert line is not None

    def healthy(port: int) -> bool:
        program = json.loads(line[1])[2].replace("18888", str(port))
        asked = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
        return asked.returncode == 0

    assert healthy(server.port)
    with live(create_app(Settings(), serving(ScriptedEngine()))) as plain:
        assert healthy(plain.port)
    assert not healthy(free_port())
