"""One line per API request, with its true outcome, whatever became of it."""

import json
from pathlib import Path

import httpx
import pytest

from ochat_serve.app import create_app
from ochat_serve.errors import ServerFault
from ochat_serve.generation import Delta, Update
from ochat_serve.request_log import RequestLog
from ochat_serve.serving import Serving
from ochat_serve.settings import Settings
from tests.fakes import ScriptedEngine, Wait, service
from tests.live import RawClient, eventually, live

CHAT = "/v1/chat/completions"
SECRET = "my diary says so"
ASK = {"messages": [{"role": "user", "content": SECRET}], "user": "u-1", "stop": ["diary"]}


def run(tmp_path: Path, engine: ScriptedEngine, talk: object, *, content: bool = False) -> list:
    """What the log holds after ``talk(server)``."""
    file = tmp_path / "requests.log"
    log = RequestLog(str(file), max_mb=1, max_count=1, content=content)
    settings = Settings(api_keys=("sk-a",), ping_interval_s=0.2)
    serving = Serving(chat=service(engine, settings, log_content=content))
    with live(create_app(settings, serving, log)) as server:
        assert callable(talk)
        talk(server)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert "sk-a" not in file.read_text()
    return lines


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
    (line,) = run(tmp_path, ScriptedEngine(), lambda s: post(s, stream=stream), content=True)
    assert line["request"]["messages"] == ASK["messages"]
    assert line["outputs"] == ["Hi!"]


@pytest.mark.parametrize(
    ("fields", "status"),
    [({"temperature": 9}, 400), ({"model": "x"}, 404), ({"tools": [{}]}, 400)],
)
def test_refused(tmp_path: Path, fields: dict[str, object], status: int) -> None:
    (line,) = run(tmp_path, ScriptedEngine(), lambda s: post(s, **fields))
    assert (line["outcome"], line["status"]) == ("failed", status)
    assert line["error"]


def test_wrong_key_unknown_route_and_probes(tmp_path: Path) -> None:
    def talk(server: object) -> None:
        httpx.post(server.url + CHAT, json=ASK)
        httpx.get(server.url + "/v1/nowhere", headers=KEY)
        httpx.get(server.url + "/livez")
        httpx.get(server.url + "/readyz", headers=KEY)

    lines = run(tmp_path, ScriptedEngine(), talk)
    assert [(line["status"], line["path"]) for line in lines] == [
        (401, CHAT),
        (404, "/v1/nowhere"),
    ], "probes are not requests"
    assert "key" not in lines[0]


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
            assert eventually(lambda: engine.running == 1)
        assert eventually(lambda: engine.running == 0)

    (line,) = run(tmp_path, engine, talk)
    assert line["outcome"] == "abandoned"
    assert line["completion_tokens"] == 1
