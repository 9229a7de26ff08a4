"""One line per API request, with its true outcome, whatever became of it."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ochat_serve.app import create_app
from ochat_serve.caller import Caller, digest_of
from ochat_serve.errors import ApiError, ServerFault, Unavailable
from ochat_serve.generation import Delta, Update
from ochat_serve.key_file import Entry, KeyFile, Secret
from ochat_serve.middleware.boundary import Boundary
from ochat_serve.request_log import RequestRecord
from ochat_serve.server import open_log
from ochat_serve.serving import Serving
from ochat_serve.settings import Settings
from tests.fakes import ScriptedEngine, Wait, service, words
from tests.live import LiveServer, RawClient, eventually, live
from tests.request_log.files import all_lines

CHAT = "/v1/chat/completions"
SECRET = "my diary says so"
ASK = {"messages": [{"role": "user", "content": SECRET}], "user": "u-1", "stop": ["diary"]}


def run(
    tmp_path: Path, engine: ScriptedEngine, talk: object, caller: Caller | None = None, **told: Any
) -> list[dict[str, Any]]:
    """What the log holds after ``talk(server)``; with ``caller``, all requests are theirs."""
    file = tmp_path / "requests.log"
    settings = Settings(api_keys=("sk-a",), ping_interval_s=0.2, log_file=str(file), **told)
    log = open_log(settings)
    assert log is not None
    serving = Serving(chat=service(engine, settings))
    if caller is not None:
        settings = settings.model_copy(update={"api_keys": (), "key_file": "given below"})
    key_file = None if caller is None else of_one(caller, tmp_path)
    app = create_app(settings, serving, log, key_file=key_file)
    with live(app, closing=(log,)) as server:
        assert callable(talk)
        talk(server)
    assert "sk-a" not in file.read_text()
    return all_lines(file)


def of_one(caller: Caller, folder: Path) -> KeyFile:
    file = KeyFile(str(folder / "keys.json"))
    secret = Secret(sha256=digest_of(b"sk-a").hex(), created="2026-01-01T00:00:00Z")
    with file.edited() as content:
        content.keys[caller.name] = Entry(log_content=caller.log_content, secrets=[secret])
    return file


KEY = {"authorization": "Bearer sk-a"}


def post(server: object, **fields: object) -> httpx.Response:
    return httpx.post(server.url + CHAT, json={**ASK, **fields}, headers=KEY)


@pytest.mark.parametrize("stream", [False, True])
def test_finished(tmp_path: Path, stream: bool) -> None:
    answers = []
    lines = run(tmp_path, ScriptedEngine(), lambda s: answers.append(post(s, stream=stream)))
    (line,) = lines
    assert line["outcome"] == "finished"
    assert line["status"] == 200
    assert line["key"] == "key-1"
    assert line["user"] == "u-1"
    assert line["model"] == "openchat_3.6"
    assert line["prompt_tokens"] == 4
    assert line["completion_tokens"] == 2
    assert line["finish_reasons"] == ["stop"]
    assert line["request_id"] == answers[0].headers["x-request-id"]
    assert line["id"].startswith("chatcmpl-")
    assert line["total_s"] >= line["first_token_s"] >= 0
    assert "request" not in line
    assert "outputs" not in line
    assert SECRET not in json.dumps(line)
    assert "diary" not in json.dumps(line)


@pytest.mark.parametrize("stream", [False, True])
def test_content_only_when_asked(tmp_path: Path, stream: bool) -> None:
    (line,) = run(tmp_path, ScriptedEngine(), lambda s: post(s, stream=stream), log_content="full")
    assert line["request"] == {**ASK, "stream": stream}
    assert line["outputs"] == ["Hi!"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_beginnings_only(tmp_path: Path, stream: bool) -> None:
    engine = ScriptedEngine(words(*["a" * 100] * 3))
    said = [{"role": "user", "content": "b" * 300}]
    (line,) = run(
        tmp_path,
        engine,
        lambda s: post(s, stream=stream, messages=said),
        log_content="truncated",
    )
    assert line["outputs"] == ["a" * 256 + "… [44 more characters]"]
    assert line["request"]["messages"][0]["content"] == "b" * 256 + "… [44 more characters]"


@pytest.mark.parametrize(
    ("servers", "keys", "kept"),
    [("none", "full", True), ("full", "none", False), ("full", None, True)],
)
def test_a_keys_own_level_wins(tmp_path: Path, servers: str, keys: Any, kept: bool) -> None:
    caller = Caller("anna", log_content=keys)
    (line,) = run(tmp_path, ScriptedEngine(), post, caller, log_content=servers)
    assert line["key"] == "anna"
    assert ("request" in line, "outputs" in line) == (kept, kept)


def test_without_a_log_nothing_is_kept_for_it() -> None:
    """Whatever the key's level is."""
    records: list[RequestRecord] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        records.append(scope["state"]["record"])
        records[-1].sent_by(Caller("anna", log_content="full"))
        await Response()(scope, receive, send)

    boundary = Boundary(app, (), time.monotonic, time.time)
    with live(boundary) as server:
        httpx.get(server.url + "/v1/models")
    assert [record.keeps_content for record in records] == [False]


@pytest.mark.parametrize("content", ["none", "full"])
def test_patterns_are_redacted(tmp_path: Path, content: str) -> None:
    engine = ScriptedEngine(words("your diary,", " of course"))
    lines = run(
        tmp_path,
        engine,
        lambda s: post(s, user="diary@u-1", metadata={"k": "my diary"}),
        log_content=content,
        log_redact=("diary", r"u-\d"),
    )
    (line,) = lines
    assert "diary" not in json.dumps(lines)
    assert (line["user"], line["metadata"]) == ("[redacted]@[redacted]", {"k": "my [redacted]"})
    if content == "full":
        assert line["outputs"] == ["your [redacted], of course"]
        assert line["request"]["messages"][0]["content"] == "my [redacted] says so"


def test_a_pattern_that_takes_for_ever_holds_up_no_request(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "x" * 5_000 + "zy"}]
    answers: list[httpx.Response] = []

    def talk(server: LiveServer) -> None:
        answers.extend(post(server, messages=said) for _ in range(5))

    lines = run(tmp_path, ScriptedEngine(), talk, log_content="full", log_redact=("(x+x+)+y",))
    assert [answer.status_code for answer in answers] == [200] * 5
    assert [line["request"]["messages"][0]["content"] for line in lines] == ["[redacted]"] * 5


def test_whoever_has_the_whole_answer_has_not_left(tmp_path: Path) -> None:
    def talk(server: LiveServer) -> None:
        with RawClient(server.port) as client:
            headers = ("Content-Type: application/json", "Authorization: Bearer sk-a")
            client.post(CHAT, json.dumps({**ASK, "stream": True}).encode(), *headers)
            client.read_until(b"0\r\n\r\n")
        assert eventually(lambda: server.connections == 0)

    (line,) = run(tmp_path, ScriptedEngine(), talk)
    assert line["outcome"] == "finished"


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_disk_fails_no_request(stream: bool) -> None:
    settings = Settings(log_file="/dev/full")
    log = open_log(settings)
    assert log is not None
    app = create_app(settings, Serving(chat=service(ScriptedEngine(), settings)), log)
    with live(app) as server:
        for count in range(1, 4):
            answer = post(server, stream=stream)
            assert (answer.status_code, "Hi" in answer.text) == (200, True)
            assert eventually(lambda count=count: log.dropped == count)
    log.close()
    assert log.dropped == 3


@pytest.mark.parametrize("logged", [True, False])
def test_lost_lines_of_all_front_ends_are_a_metric(logged: bool) -> None:
    settings = Settings(log_file="/dev/full" if logged else None)
    lost = [4, 2, 0]  # the last of them is this process
    log = open_log(settings, lost)
    app = create_app(settings, Serving(chat=service(ScriptedEngine(), settings)), log)
    with live(app) as server:
        post(server)
        assert eventually(lambda: lost[-1] == logged)
        text = httpx.get(server.url + "/metrics").text
    engine = ScriptedEngine().metrics().decode()
    assert text == engine + logged * (
        "# HELP ochat_log_dropped_total Lines of the request log that were lost.\n"
        "# TYPE ochat_log_dropped_total counter\n"
        "ochat_log_dropped_total 7\n"
    )
    if log is not None:
        log.close()


@pytest.mark.parametrize(
    ("fields", "status"),
    [({"temperature": 9}, 400), ({"model": "x"}, 404), ({"tools": [{}]}, 400)],
)
def test_refused(tmp_path: Path, fields: dict[str, object], status: int) -> None:
    (line,) = run(tmp_path, ScriptedEngine(), lambda s: post(s, **fields))
    assert (line["outcome"], line["status"]) == ("rejected", status)
    assert line["error"]


def test_wrong_key_unknown_route_and_probes(tmp_path: Path) -> None:
    def talk(server: object) -> None:
        httpx.post(server.url + CHAT, json=ASK)
        httpx.get(server.url + "/v1/nowhere", headers=KEY)
        httpx.get(server.url + "/livez")
        httpx.get(server.url + "/readyz", headers=KEY)

    lines = run(tmp_path, ScriptedEngine(), talk)
    assert [(line["status"], line["path"], line["outcome"], line["error"]) for line in lines] == [
        (401, CHAT, "rejected", "invalid_api_key"),
        (404, "/v1/nowhere", "rejected", "invalid_request_error"),
    ], "probes are not requests"
    assert "key" not in lines[0]


def test_not_ready_is_a_refusal(tmp_path: Path) -> None:
    engine = ScriptedEngine(failure="It is gone.")
    (line,) = run(tmp_path, engine, post)
    assert (line["outcome"], line["status"], line["error"]) == ("failed", 503, "engine_dead")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Unavailable("Full.", code="overloaded", retry_after_s=1), "rejected"),
        (Unavailable("Gone.", code="engine_dead", retry_after_s=1), "failed"),
        (Unavailable("Too late.", code="queue_timeout", retry_after_s=1), "timeout"),
    ],
)
def test_the_error_tells_what_became_of_it(tmp_path: Path, error: ApiError, outcome: str) -> None:
    (line,) = run(tmp_path, ScriptedEngine([error]), post)
    assert (line["outcome"], line["error"]) == (outcome, error.code)


class SlowToEnd(ScriptedEngine):
    @asynccontextmanager
    async def generate(self, *request: Any, **known: Any) -> AsyncGenerator[Any, None]:
        async with super().generate(*request, **known) as generation:
            try:
                yield generation
            finally:
                await asyncio.sleep(0.2)


@pytest.mark.parametrize("stream", [False, True])
def test_cut_off_by_the_servers_end(tmp_path: Path, stream: bool) -> None:
    """One record each, though the server ends while they run, and they take their time."""
    engine = SlowToEnd(script=[Update([Delta(0, "a", 1)]), Wait()])
    clients = []

    def talk(server: LiveServer) -> None:
        for _ in range(3):
            client = RawClient(server.port)
            clients.append(client)
            body = json.dumps({**ASK, "stream": stream}).encode()
            client.post(CHAT, body, "Content-Type: application/json", "Authorization: Bearer sk-a")
        assert eventually(lambda: [g.taken for g in engine.generations] == [1] * 3)

    lines = run(tmp_path, engine, talk)
    for client in clients:
        client.hang_up()
    assert [line["outcome"] for line in lines] == ["shutdown"] * 3
    assert [line["completion_tokens"] for line in lines] == [1] * 3


def test_failed_in_the_stream(tmp_path: Path) -> None:
    engine = ScriptedEngine(script=[Update([Delta(0, "a", 1)]), ServerFault()])
    (line,) = run(tmp_path, engine, lambda s: post(s, stream=True))
    assert (line["outcome"], line["status"]) == ("failed", 200)
    assert line["error"] == "server_error"
    assert line["completion_tokens"] == 1


def test_failed_after_a_comment(tmp_path: Path) -> None:
    wait = Wait()
    engine = ScriptedEngine(script=[wait, ServerFault()])

    def talk(server: object) -> None:
        with RawClient(server.port) as client:
            body = json.dumps({**ASK, "stream": True}).encode()
            client.post(CHAT, body, "Content-Type: application/json", "Authorization: Bearer sk-a")
            client.read_until(b": ping")
            server.loop.call_soon_threadsafe(wait.go.set)
            client.read_until(b"[DONE]")

    (line,) = run(tmp_path, engine, talk)
    assert (line["outcome"], line["error"]) == ("failed", "server_error")


def test_a_long_path_is_cut(tmp_path: Path) -> None:
    lines = run(tmp_path, ScriptedEngine(), lambda s: httpx.get(s.url + "/v1/" + "x" * 9_000))
    assert len(lines[0]["path"]) == 256


def test_a_bug(tmp_path: Path) -> None:
    (line,) = run(tmp_path, ScriptedEngine(script=[ZeroDivisionError()]), lambda s: post(s))
    assert (line["outcome"], line["status"], line["error"]) == ("failed", 500, "unexpected")


@pytest.mark.parametrize("stream", [False, True])
def test_abandoned(tmp_path: Path, stream: bool) -> None:
    engine = ScriptedEngine(script=[Update([Delta(0, "a", 1)]), Wait()])

    def talk(server: object) -> None:
        with RawClient(server.port) as client:
            body = json.dumps({**ASK, "stream": stream}).encode()
            headers = ("Content-Type: application/json", "Authorization: Bearer sk-a")
            client.post(CHAT, body, *headers)
            assert eventually(lambda: [g.taken for g in engine.generations] == [1])
        assert eventually(lambda: engine.running == 0)

    (line,) = run(tmp_path, engine, talk)
    assert line["outcome"] == "abandoned"
    assert line["completion_tokens"] == 1
