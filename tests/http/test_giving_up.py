"""Chats that are given up from outside: each ends as if its generation had failed."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ochat_serve.app import create_app
from ochat_serve.caller import Caller
from ochat_serve.errors import Unavailable
from ochat_serve.generation import Delta, Update
from ochat_serve.protocol.chat import ChatCompletionRequest
from ochat_serve.request_log import RequestRecord
from ochat_serve.settings import Settings
from tests.fakes import ScriptedEngine, Wait, serving, words
from tests.live import RawClient, eventually, live
from tests.request_log.files import request_log

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "one two"}]}
BEGUN = [Update([Delta(0, "a", 1)]), Update([Delta(0, "b", 1)])]


def error() -> Unavailable:
    return Unavailable("Enough.", code="shutting_down", retry_after_s=5)


class Served:
    """A server with an engine that says a little and then waits, and with a log."""

    def __init__(self, folder: Path, script: list) -> None:
        self.engine = ScriptedEngine(script=script)
        self.serving = serving(self.engine)
        self.file = folder / "requests.log"
        log = request_log(self.file)
        self.closing = (log,)
        self.app = create_app(Settings(), self.serving, log)

    def fail(self, server: object) -> None:
        server.loop.call_soon_threadsafe(self.serving.chat.running.fail, error())

    def line(self) -> dict[str, object]:
        (line,) = self.file.read_text().splitlines()
        return json.loads(line)


def test_a_stream_that_has_begun_ends_with_an_error_event(tmp_path: Path) -> None:
    served = Served(tmp_path, [*BEGUN, Wait()])
    with live(served.app, closing=served.closing) as server, RawClient(server.port) as client:
        client.post(CHAT, json.dumps({**ASK, "stream": True}).encode())
        client.read_until(b'"content":"b"')
        served.fail(server)
        received = client.read_until(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert b'"code":"shutting_down"' in received
        assert b'finish_reason":"' not in received, "nothing pretends to have finished"
        assert eventually(lambda: served.engine.running == 0)
    line = served.line()
    assert (line["status"], line["outcome"], line["error"]) == (200, "shutdown", "shutting_down")
    assert line["completion_tokens"] == 2


@pytest.mark.parametrize("stream", [True, False])
def test_before_the_first_token_it_is_a_503(tmp_path: Path, stream: bool) -> None:
    served = Served(tmp_path, [Wait()])
    with live(served.app, closing=served.closing) as server, RawClient(server.port) as client:
        client.post(CHAT, json.dumps({**ASK, "stream": stream}).encode())
        assert eventually(lambda: served.engine.running == 1)
        served.fail(server)
        received = client.read_until(b"}}").decode()
        assert received.startswith("HTTP/1.1 503 ")
        assert "retry-after: 5\r\n" in received
        assert '"code":"shutting_down"' in received
        assert eventually(lambda: served.engine.running == 0)
    line = served.line()
    assert (line["status"], line["outcome"], line["error"]) == (503, "shutdown", "shutting_down")


def test_one_body_in_its_middle_is_a_503(tmp_path: Path) -> None:
    served = Served(tmp_path, [*BEGUN, Wait()])
    with live(served.app, closing=served.closing) as server, RawClient(server.port) as client:
        client.post(CHAT, json.dumps(ASK).encode())
        assert eventually(lambda: served.engine.generations)
        served.fail(server)
        assert client.read_until(b"}}").startswith(b"HTTP/1.1 503 ")
    assert served.line()["error"] == "shutting_down"


def test_all_of_many_are_given_up_at_once(tmp_path: Path) -> None:
    served = Served(tmp_path, [*BEGUN, Wait()])
    with live(served.app, closing=served.closing) as server:
        clients = [RawClient(server.port) for _ in range(10)]
        for client in clients:
            client.post(CHAT, json.dumps({**ASK, "stream": True}).encode())
            client.read_until(b'"content":"b"')
        served.fail(server)
        for client in clients:
            assert client.read_until(b"[DONE]").count(b"shutting_down") == 1
            client.hang_up()
        assert eventually(lambda: served.engine.running == 0)


def test_a_reader_that_never_reads_does_not_hide_the_outcome(tmp_path: Path) -> None:
    """Its error event cannot be written; the record tells it all the same."""
    script = [*words(*["x" * 8_000] * 2_000)[:-1], Wait()]
    served = Served(tmp_path, script)
    with (
        live(served.app, closing=served.closing) as server,
        RawClient(server.port, receive_buffer=4_096) as client,
    ):
        client.post(CHAT, json.dumps({**ASK, "stream": True}).encode())
        assert eventually(
            lambda: served.engine.generations and served.engine.generations[0].waiting > 500
        )
        served.fail(server)
        client.hang_up()
        assert eventually(lambda: served.engine.running == 0)
    assert served.line()["error"] == "shutting_down"


def test_a_reader_that_never_reads_holds_no_place_beyond_its_time(tmp_path: Path) -> None:
    """Its write timeout, a minute, is not waited for; and the log tells what ended it."""
    script = [*words(*["x" * 8_000] * 2_000)[:-1], Wait()]
    served = Served(tmp_path, script)
    with (
        live(served.app, closing=served.closing) as server,
        RawClient(server.port, receive_buffer=4_096) as client,
    ):
        body = json.dumps({**ASK, "stream": True}).encode()
        client.post(CHAT, body, "Content-Type: application/json", "x-ochat-timeout-s: 0.5")
        assert eventually(lambda: served.engine.running == 1)
        assert eventually(lambda: served.engine.running == 0)
        assert served.serving.chat.admission.running == 0
        client.hang_up()
    line = served.line()
    assert (line["outcome"], line["error"]) == ("timeout", "deadline_exceeded")


def test_who_leaves_at_the_end_cuts_no_clean_up_short(tmp_path: Path) -> None:
    served = Served(tmp_path, words("Hi"))
    told: list[str] = []
    generate = served.engine.generate

    @asynccontextmanager
    async def slow(*args: object, **kwargs: object) -> AsyncGenerator[object, None]:
        async with generate(*args, **kwargs) as generation:
            yield generation
        told.append("asked")
        await asyncio.sleep(0.3)
        told.append("aborted")

    served.engine.generate = slow
    with live(served.app, closing=served.closing) as server, RawClient(server.port) as client:
        client.post(CHAT, json.dumps({**ASK, "stream": True}).encode())
        assert eventually(lambda: told)
        client.hang_up()
        assert eventually(lambda: told == ["asked", "aborted"])
        assert eventually(lambda: served.serving.chat.admission.running == 0)


async def test_the_first_error_counts_and_after_the_last_update_none_does() -> None:
    engine = ScriptedEngine(script=words("Hi"))
    service = serving(engine).chat
    chat = await prepared(service)
    async with chat.stream() as stream:
        ready = asyncio.Event()
        stream.listen(ready.set)
        await ready.wait()
        assert b'"finish_reason":"stop"' in stream.take()
        stream._source.fail(error())
        assert chat._record.error is None

    engine.script = [Wait()]
    chat = await prepared(service)
    async with chat.stream() as stream:
        service.running.fail(error())
        service.running.fail(Unavailable("Later.", code="engine_dead", retry_after_s=1))
        ready.clear()
        stream.listen(ready.set)
        assert ready.is_set(), "a late listener is called at once"
        with pytest.raises(Unavailable) as raised:
            stream.take()
    assert raised.value.code == chat._record.error == "shutting_down"
    assert len(service.running) == 0


async def prepared(service: object) -> object:
    record = RequestRecord(time=0, request_id="r", method="POST", path=CHAT)
    return await service.prepare(ChatCompletionRequest(**ASK, stream=True), record, Caller(None))
