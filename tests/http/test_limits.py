"""Limits of a key, as its clients see them."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from ochat_serve import keys
from ochat_serve.app import create_app
from ochat_serve.clock import periods
from ochat_serve.generation import Conversation, EngineInfo
from ochat_serve.key_file import KeyFile
from ochat_serve.limits import MemoryLimits
from ochat_serve.serving import Serving
from ochat_serve.settings import Settings
from ochat_serve.usage.counters import Row
from ochat_serve.usage.database import sqlite_database
from ochat_serve.usage.ledger import UsageLedger
from ochat_serve.usage.reader import LedgerReader
from ochat_serve.usage_db import used_before
from tests.fakes import ScriptedEngine, Wait, WordPrompts, service, words
from tests.live import LiveServer, RawClient, eventually, live

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "one two three"}]}  # 3 tokens; answers have 2
BOTH = pytest.mark.parametrize("stream", [False, True])


class Limited:
    """A server with one key, whose limits the test names."""

    def __init__(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._file = str(tmp_path / "keys.json")
        self._capsys = capsys
        self._keys: dict[str, str] = {}
        info = EngineInfo(max_model_len=1_000, vocab_size=1_000, version="0")
        self.engine = ScriptedEngine(info=info)
        self.prompts = WordPrompts()

    def start(
        self, limits: str, serving: Serving | None = None, ledger: UsageLedger | None = None
    ) -> AbstractContextManager[LiveServer]:
        if "alice" not in self._keys:
            self.add("alice", limits)
        settings = Settings(key_file=self._file)
        self.serving = serving or Serving()
        self.serving.chat = service(self.engine, settings, self.prompts, limits=self.serving.limits)
        key_file = KeyFile(self._file)
        return live(
            create_app(settings, self.serving, key_file=key_file, ledger=ledger),
            closing=(ledger,) if ledger else (),
        )

    def add(self, name: str, limits: str = "") -> None:
        assert keys.main(["--key-file", self._file, "add", name, *limits.split()]) == 0
        self._keys[name] = self._capsys.readouterr().out.strip()

    @property
    def key(self) -> str:
        return self._keys["alice"]

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def ask(self, server: LiveServer, key: str = "alice", **fields: object) -> httpx.Response:
        headers = {"authorization": f"Bearer {self._keys[key]}"}
        return httpx.post(server.url + CHAT, json={**ASK, **fields}, headers=headers, timeout=20)


@pytest.fixture
def limited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Limited:
    return Limited(tmp_path, capsys)


def code(answer: httpx.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["type"], error["code"]


@BOTH
def test_requests_per_minute_count_everything(limited: Limited, stream: bool) -> None:
    with limited.start("--requests-per-minute 5") as server:
        answers = [
            limited.ask(server, stream=stream),
            limited.ask(server, n=99),
            httpx.get(server.url + "/nowhere", headers=limited.headers),
            httpx.get(server.url + "/metrics", headers=limited.headers),
            httpx.get(server.url + "/v1/models", headers=limited.headers),
        ]
        assert [answer.status_code for answer in answers] == [200, 400, 404, 403, 200]
        left = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
        assert left == ["4", "3", "2", "1", "0"]
        refused = limited.ask(server, stream=stream)
        assert code(refused) == (429, "requests", "rate_limit_exceeded")
        assert "5 requests per minute" in refused.json()["error"]["message"]
        assert 11 <= int(refused.headers["retry-after"]) <= 12
        assert refused.headers["x-ratelimit-limit-requests"] == "5"
        assert httpx.get(server.url + "/livez").status_code == 200


@BOTH
def test_tokens_per_minute_are_settled_to_what_was_used(limited: Limited, stream: bool) -> None:
    with limited.start("--tokens-per-minute 100") as server:
        for left in (40, 35, 30):  # of 60 reserved, 5 are used
            answer = limited.ask(server, stream=stream, max_tokens=57)
            assert answer.status_code == 200
            told = int(answer.headers["x-ratelimit-remaining-tokens"])
            assert left <= told <= left + 10
        refused = limited.ask(server, stream=stream, max_tokens=97)
        assert code(refused) == (429, "tokens", "rate_limit_exceeded")
        assert "100 tokens per minute" in refused.json()["error"]["message"]
        assert "100 requested" in refused.json()["error"]["message"]


def test_an_aborted_stream_pays_for_what_it_made(limited: Limited) -> None:
    limited.engine.script = [*words("a", "b", "c"), Wait()]
    with limited.start("--tokens-per-day 1000") as server:
        body = json.dumps({**ASK, "stream": True}).encode()
        with RawClient(server.port) as client:
            client.post(
                CHAT, body, "Content-Type: application/json", f"Authorization: Bearer {limited.key}"
            )
            client.read_until(b'"content":"c"')
        assert eventually(lambda: limited.engine.running == 0)
        used = limited.serving.limits._use["alice"].periods
        assert eventually(lambda: set(used.values()) == {6})


@BOTH
def test_parallel_requests(limited: Limited, stream: bool) -> None:
    wait = Wait()
    limited.engine.script = [wait, *words("done")]
    with limited.start("--parallel-requests 1") as server, RawClient(server.port) as client:
        body = json.dumps({**ASK, "stream": stream}).encode()
        client.post(
            CHAT, body, "Content-Type: application/json", f"Authorization: Bearer {limited.key}"
        )
        assert eventually(lambda: limited.engine.running == 1)
        refused = limited.ask(server, stream=stream)
        assert code(refused) == (429, "requests", "rate_limit_exceeded")
        assert "1 parallel requests" in refused.json()["error"]["message"]
        server.loop.call_soon_threadsafe(wait.go.set)
        client.read_until(b"done")
        assert eventually(lambda: limited.engine.running == 0)
        assert limited.ask(server, stream=stream).status_code == 200


@BOTH
def test_a_quota(limited: Limited, stream: bool) -> None:
    with limited.start("--tokens-per-month 12") as server:
        statuses = [limited.ask(server, stream=stream).status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]  # 5 each: the third goes over
        refused = limited.ask(server, stream=stream)
        assert code(refused) == (429, "insufficient_quota", "insufficient_quota")
        assert "quota of 12 tokens" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) > 0


def test_what_does_not_run_costs_no_tokens(limited: Limited) -> None:
    with limited.start("--tokens-per-minute 1000 --parallel-requests 1") as server:
        limited.engine.refuses = ZeroDivisionError()
        for _ in range(3):
            assert limited.ask(server).status_code == 500
        limited.engine.refuses = None
        answer = limited.ask(server, max_tokens=7)
        assert answer.headers["x-ratelimit-remaining-tokens"] == "990"


def test_keys_without_limits_have_no_such_headers(limited: Limited) -> None:
    with limited.start("") as server:
        answer = limited.ask(server)
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


def test_a_quota_goes_on_where_the_ledger_stands(
    limited: Limited, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A restart gives nobody a fresh day."""
    place = str(tmp_path / "usage.sqlite")
    statuses = []
    for _ in range(3):
        ledger = UsageLedger(sqlite_database(place), anonymous=False)
        used = used_before(LedgerReader(ledger))
        serving = Serving(limits=MemoryLimits(time.time, periods, used))
        with limited.start("--tokens-per-day 9", serving, ledger) as server:
            statuses.append(limited.ask(server).status_code)
    assert statuses == [200, 200, 429]


def test_equal_choices_count_as_often_as_they_are_sent(limited: Limited) -> None:
    """They are made once, which is the server's gain."""
    with limited.start("--tokens-per-minute 1000") as server:
        answer = limited.ask(server, n=8, temperature=0, max_tokens=100)
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-remaining-tokens"] == str(1000 - 3 - 8 * 100)
        assert limited.serving.chat.admission.running == 0


class LongPrompts(WordPrompts):
    """All are long, and are rendered when they may."""

    def __init__(self) -> None:
        super().__init__()
        self.wait = Wait()
        self.rendering = self.rendered = 0

    def is_long(self, conversation: Conversation) -> bool:
        return True

    async def render(
        self,
        conversation: Conversation,
        max_tokens: int | None = None,
        cache_salt: str | None = None,
    ) -> list[int]:
        self.rendering += 1
        try:
            await self.wait.go.wait()
        finally:
            self.rendering -= 1
        self.rendered += 1
        return await super().render(conversation)


@BOTH
def test_a_long_prompt_is_one_of_the_parallel_requests_before_it_is_rendered(
    limited: Limited, stream: bool
) -> None:
    limited.prompts = prompts = LongPrompts()
    limits = "--parallel-requests 1 --tokens-per-minute 1000"
    with limited.start(limits) as server, ThreadPoolExecutor(1) as client:
        first = client.submit(limited.ask, server, stream=stream, max_tokens=7)
        assert eventually(lambda: prompts.rendering == 1)
        refused = limited.ask(server, stream=stream)
        assert code(refused) == (429, "requests", "rate_limit_exceeded")
        assert "1 parallel requests" in refused.json()["error"]["message"]
        server.loop.call_soon_threadsafe(prompts.wait.go.set)
        assert first.result().status_code == 200
        assert first.result().headers["x-ratelimit-remaining-tokens"] == "990"
        assert prompts.rendered == 1
        assert limited.ask(server, stream=stream, max_tokens=7).status_code == 200


@BOTH
@pytest.mark.parametrize("limit", ["tokens-per-day", "tokens-per-month", "tokens-per-minute"])
def test_a_long_prompt_is_not_rendered_where_nothing_is_left(
    limited: Limited, limit: str, stream: bool
) -> None:
    limited.prompts = prompts = LongPrompts()
    prompts.wait.go.set()
    with limited.start(f"--{limit} 3") as server:
        assert limited.ask(server, stream=stream).status_code == 200  # 5 tokens
        assert limited.ask(server, stream=stream).status_code == 429
    assert prompts.rendered == 1


def test_a_client_that_leaves_while_its_prompt_waits_is_dropped(limited: Limited) -> None:
    limited.prompts = prompts = LongPrompts()
    with limited.start("--parallel-requests 1") as server:
        for stream in (False, True):
            with RawClient(server.port) as client:
                client.post(
                    CHAT,
                    json.dumps({**ASK, "stream": stream}).encode(),
                    "Content-Type: application/json",
                    f"Authorization: Bearer {limited.key}",
                )
                assert eventually(lambda: prompts.rendering == 1)
            assert eventually(lambda: prompts.rendering == 0)
        server.loop.call_soon_threadsafe(prompts.wait.go.set)
        assert eventually(lambda: limited.ask(server).status_code == 200)
    assert prompts.rendered == 1
    assert len(limited.engine.requests) == 1


class Hanging:
    """A ledger whose database gives no answer until it may."""

    def __init__(self) -> None:
        self.may_answer = threading.Event()

    def read(self, *question: object) -> list[Row]:
        self.may_answer.wait(30)
        return []


def test_a_usage_database_that_hangs_is_told_and_stops_nobody_else(limited: Limited) -> None:
    """More requests wait for it than the event loop has threads; a long body needs one."""
    ledger = Hanging()
    used = used_before(LedgerReader(ledger, timeout_s=0.5))
    serving = Serving(limits=MemoryLimits(time.time, periods, used))
    limited.add("bob")
    with limited.start("--tokens-per-day 1000", serving) as server:
        with ThreadPoolExecutor(40) as clients:
            asking = [clients.submit(limited.ask, server) for _ in range(40)]
            long = {"messages": [{"role": "user", "content": "x" * 300_000}]}
            assert limited.ask(server, key="bob", **long).status_code == 200
            refused = [each.result() for each in asking]
        assert {code(answer) for answer in refused} == {(503, "server_error", "usage_unavailable")}
        assert {answer.headers["retry-after"] for answer in refused} == {"5"}
        ledger.may_answer.set()
        assert eventually(lambda: limited.ask(server).status_code == 200)
