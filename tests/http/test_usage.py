"""The ledger behind the server: it is the sum of the request log."""

import asyncio
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from ochat_serve.app import create_app
from ochat_serve.caller import Caller
from ochat_serve.errors import ServerFault
from ochat_serve.generation import Delta, Update
from ochat_serve.protocol.chat import ChatCompletionRequest
from ochat_serve.request_log import RequestRecord
from ochat_serve.serving import Serving
from ochat_serve.settings import Settings
from ochat_serve.usage.counters import ANONYMOUS, Counters, Row
from ochat_serve.usage.database import sqlite_database
from ochat_serve.usage.ledger import UsageLedger
from tests.fakes import ScriptedEngine, Wait, service, words
from tests.live import LiveServer, RawClient, eventually, live
from tests.request_log.files import request_log
from tests.usage.accounts import EVER, sums

CHAT = "/v1/chat/completions"
USAGE = "/v1/usage"
ASK = {"messages": [{"role": "user", "content": "one two three"}]}
A = {"authorization": "Bearer sk-a"}
B = {"authorization": "Bearer sk-b"}


class Server:
    """A server with a log and a ledger; ``engine`` is what answers."""

    def __init__(self, folder: Path, keys: Sequence[str], engine: ScriptedEngine) -> None:
        self.engine = engine
        self.file = folder / "usage"
        self.log = folder / "requests.log"
        settings = Settings(api_keys=tuple(keys), ping_interval_s=0.1)
        database = sqlite_database(str(self.file), busy_timeout_s=0.01)
        self.ledger = UsageLedger(database, anonymous=not keys)
        log = request_log(self.log)
        self.closing = (log, self.ledger)
        self.app = create_app(
            settings, Serving(chat=service(engine, settings)), log, ledger=self.ledger
        )

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def accounts(self) -> list[Row]:
        """What stands in the file: no server runs any more."""
        database = sqlite_database(str(self.file))
        rows = database.read(*EVER, None)
        database.close()
        return sorted(rows, key=lambda row: (row.day, row.key))


@contextmanager
def serve(
    folder: Path, *, keys: Sequence[str] = ("sk-a", "sk-b"), engine: ScriptedEngine | None = None
) -> Iterator[tuple[Server, LiveServer]]:
    server = Server(folder, keys, engine or ScriptedEngine())
    with live(server.app, closing=server.closing) as running:
        yield server, running


def post(running: LiveServer, headers: dict[str, str], **fields: object) -> httpx.Response:
    return httpx.post(running.url + CHAT, json={**ASK, **fields}, headers=headers)


def begin(running: LiveServer, client: RawClient, **fields: object) -> None:
    body = json.dumps({**ASK, **fields}).encode()
    client.post(CHAT, body, "Content-Type: application/json", "Authorization: Bearer sk-a")


def test_the_ledger_is_the_sum_of_the_log(tmp_path: Path) -> None:
    """Requests of every fate, and what they are: finished, streamed, refused, unknown."""
    with serve(tmp_path) as (server, running):
        for headers in (A, A, B):
            assert post(running, headers).status_code == 200
            assert post(running, headers, stream=True).status_code == 200
        assert post(running, A, temperature=9).status_code == 400
        assert httpx.get(running.url + "/v1/nowhere", headers=B).status_code == 404
        assert httpx.get(running.url + "/v1/models", headers=B).status_code == 200
        server.engine.script = [Update([Delta(0, "a", 1)], cached_tokens=2), ServerFault()]
        assert post(running, B).status_code == 500
        assert b"[DONE]" in post(running, B, stream=True).content
        server.engine.script = [ZeroDivisionError()]
        assert post(running, A).status_code == 500
        server.engine.script = [Update([Delta(0, "a", 1)]), Wait()]
        for stream in (False, True):
            with RawClient(running.port) as client:
                begin(running, client, stream=stream)
                assert eventually(lambda: server.engine.running == 1)
            assert eventually(lambda: server.engine.running == 0)
    lines = server.lines()
    assert len(lines) == 14
    first, second = server.accounts()
    assert [first, second] == sums(lines)
    assert first.counters == Counters(8, 7 * 3, 4 * 2 + 2, 0, errors=2, aborted=2)
    assert second.counters == Counters(6, 4 * 3, 2 * 2 + 2, 4, errors=3)


def test_strangers_are_nobody(tmp_path: Path) -> None:
    """A wrong key is in the log; an account it has not."""
    with serve(tmp_path) as (server, running):
        assert post(running, {}).status_code == 401
        assert post(running, {"authorization": "Bearer sk-c"}).status_code == 401
        assert httpx.get(running.url + "/readyz", headers=A).status_code == 200
    assert len(server.lines()) == 2
    assert server.accounts() == []


def test_a_key_sees_its_own(tmp_path: Path) -> None:
    with serve(tmp_path) as (_, running):
        post(running, A)
        mine, his = (httpx.get(running.url + USAGE, headers=key).json() for key in (A, B))
        assert mine["data"][0]["key"] == "key-1"
        assert his["data"] == []
        for key in ("key-1", "*"):
            answer = httpx.get(running.url + USAGE, headers=B, params={"key": key})
            assert answer.status_code == 403


def test_without_keys_everybody_is_one(tmp_path: Path) -> None:
    with serve(tmp_path, keys=()) as (server, running):
        post(running, {})
        post(running, A)
        answer = httpx.get(running.url + USAGE, params={"key": "*"}).json()
    assert answer["data"][0]["key"] == ANONYMOUS
    assert answer["total"]["requests"] == 2
    (account,) = server.accounts()
    assert (account.key, account.counters.completion_tokens) == (ANONYMOUS, 4)


def test_what_an_aborted_stream_had_generated_counts(tmp_path: Path) -> None:
    """Some of it was sent; some had come and was not read when the client left."""
    wait = Wait()
    script = [Update([Delta(0, "a", 1)]), Update([Delta(0, "b", 1)]), wait]
    with serve(tmp_path, engine=ScriptedEngine(script=script)) as (server, running):
        with RawClient(running.port) as client:
            begin(running, client, stream=True)
            client.read_until(b'"content":"b"')
        assert eventually(lambda: server.engine.running == 0)
    assert server.accounts()[0].counters == Counters(1, 3, 2, aborted=1)


async def test_what_nobody_took_was_generated_too() -> None:
    """A client that never reads would have everything for nothing."""
    chats = service(ScriptedEngine(script=words("a", "b")))
    record = RequestRecord(time=0, request_id="r", method="POST", path=CHAT)
    chat = await chats.prepare(ChatCompletionRequest.model_validate(ASK), record, Caller(None))
    async with chat.stream() as events:
        ready = asyncio.Event()
        events.listen(ready.set)
        await ready.wait()
    assert not events.finished
    assert record.usage is not None
    assert record.usage.completion_tokens == 1


@pytest.mark.parametrize("stream", [False, True])
def test_cut_off_at_the_end_of_the_server(tmp_path: Path, stream: bool) -> None:
    """The log and the ledger are closed after the last request, even one that would not end."""
    script = [Update([Delta(0, "a", 1)]), Wait()]
    client = None
    with serve(tmp_path, engine=ScriptedEngine(script=script)) as (server, running):
        client = RawClient(running.port)
        begin(running, client, stream=stream)
        assert eventually(lambda: server.engine.running == 1)
    client.hang_up()
    assert [line["completion_tokens"] for line in server.lines()] == [1]
    assert server.accounts() == sums(server.lines())


def test_a_locked_database_keeps_nobody_waiting(tmp_path: Path) -> None:
    with (
        serve(tmp_path) as (server, running),
        closing(sqlite3.connect(server.file, isolation_level=None)) as other,
    ):
        assert httpx.get(running.url + USAGE, headers=A).status_code == 200
        other.execute("BEGIN IMMEDIATE")
        assert post(running, A).status_code == 200
        # Reading works, and sees what waits.
        answer = httpx.get(running.url + USAGE, headers=A).json()
        assert answer["total"]["completion_tokens"] == 2
        other.execute("ROLLBACK")
    assert server.accounts() == sums(server.lines())
