"""With keys set, nothing but liveness answers without one; and each key opens what it may."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ochat_serve import keys
from ochat_serve.app import create_app
from ochat_serve.failed_attempts import ALLOWED
from ochat_serve.key_file import KeyFile
from ochat_serve.settings import Settings
from tests.fakes import ScriptedEngine, Wait, serving, words
from tests.live import LiveServer, RawClient, eventually, live

KEYS = ("sk-first", "sk-second")
ODD_PATHS = [
    "//v1/models",
    "/V1/models",
    "/v1/%6dodels",
    "/v1/models/",
    "/v1/./models",
    "/livez/",
    "//livez",
    "/livez/../v1/models",
    "/Livez",
    "/docs",
    "/openapi.json",
    "/redoc",
    "/metrics",
    "/nowhere",
    "/",
]


CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "one two"}]}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture  # each its own: wrong keys are counted
def server() -> Iterator[LiveServer]:
    settings = Settings(api_keys=KEYS, admin_keys=("sk-boss",))
    with live(create_app(settings, serving(ScriptedEngine(), settings))) as running:
        yield running


def test_every_route_is_closed_but_liveness(server: LiveServer) -> None:
    routes = create_app(Settings(), serving(ScriptedEngine())).routes
    paths = {route.path.replace("{model:path}", "openchat_3.6") for route in routes}
    assert {
        "/v1/chat/completions",
        "/v1/models",
        "/readyz",
        "/health",
        "/version",
        "/metrics",
    } <= paths
    for path in (paths - {"/livez"}) | set(ODD_PATHS):
        for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE"):
            answer = httpx.request(method, server.url + path)
            assert answer.status_code == 401, (method, path)
    assert httpx.get(server.url + "/livez").status_code == 200


def test_the_path_as_sent_decides(server: LiveServer) -> None:
    """httpx cleans paths; a socket does not."""
    for path in ("/livez/../v1/models", "/%6civez/../v1/models", "http://livez/v1/models"):
        with RawClient(server.port) as client:
            client.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert b" 401 " in client.read_until(b"\r\n")


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(server: LiveServer, key: str) -> None:
    answer = httpx.get(server.url + "/v1/models", headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [b"", b"Bearer", b"Bearer wrong", b"Basic sk-first", b"sk-first",
     b"Bearer sk-FIRST", b"Bearer sk-first,sk-second", b"Bearer \xff\xfe", b"Bearer sk-firs"],
)  # fmt: skip
def test_anything_else_is_401_in_openais_body(server: LiveServer, authorization: bytes) -> None:
    answer = httpx.get(server.url + "/v1/models", headers={b"authorization": authorization})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert error["code"] == "invalid_api_key"
    assert "sk-" not in error["message"]


def test_no_keys_set_means_no_check() -> None:
    with live(create_app(Settings(), serving(ScriptedEngine()))) as server:
        assert httpx.get(server.url + "/v1/models").status_code == 200


def test_what_only_administrators_see(server: LiveServer) -> None:
    for path, opened in (("/metrics", 200), ("/openapi.json", 200), ("/docs", 404)):
        refused = httpx.get(server.url + path, headers=bearer("sk-first"))
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "insufficient_permissions"
        assert httpx.get(server.url + path, headers=bearer("sk-boss")).status_code == opened
    assert httpx.post(server.url + CHAT, json=ASK, headers=bearer("sk-boss")).status_code == 200


@pytest.mark.parametrize(("host", "status"), [("localhost", 200), ("0.0.0.0", 403)])
def test_without_keys_only_this_machine_is_an_administrator(host: str, status: int) -> None:
    settings = Settings(host=host, insecure_no_auth=True)
    with live(create_app(settings, serving(ScriptedEngine()))) as server:
        assert httpx.get(server.url + "/metrics").status_code == status


@pytest.mark.parametrize(
    ("told", "trusted"),
    [
        ({"x-forwarded-for": "203.0.113.7"}, ("127.0.0.1",)),
        # What a client has written, passed on by a gateway that should not have.
        ({"x-forwarded-for": "127.0.0.1"}, ("127.0.0.1",)),
        ({"x-forwarded-for": "unknown"}, ("127.0.0.1",)),
        ({"x-forwarded-for": "203.0.113.7"}, ()),
        ({"forwarded": "for=203.0.113.7"}, ()),
        ({"via": "1.1 gateway"}, ()),
        ({"x-real-ip": "203.0.113.7"}, ()),
    ],
)
def test_who_comes_through_a_gateway_is_no_administrator(
    told: dict[str, str], trusted: tuple[str, ...]
) -> None:
    """Without keys: the gateway stands on this machine, its clients elsewhere."""
    settings = Settings(forwarded_allow_ips=trusted)
    with live(create_app(settings, serving(ScriptedEngine()))) as server:
        for path in ("/metrics", "/openapi.json"):
            refused = httpx.get(server.url + path, headers=told)
            assert refused.status_code == 403
            assert refused.json()["error"]["code"] == "insufficient_permissions"
            assert httpx.get(server.url + path).status_code == 200
        assert httpx.post(server.url + CHAT, json=ASK, headers=told).status_code == 200


def test_guessing_is_slowed_down_and_a_working_key_works_on(server: LiveServer) -> None:
    def status(key: str) -> int:
        return httpx.get(server.url + "/v1/models", headers=bearer(key)).status_code

    assert status("sk-first") == 200
    assert [status(f"sk-{n}") for n in range(ALLOWED)] == [401] * ALLOWED
    slowed = httpx.get(server.url + "/v1/models", headers=bearer("sk-x"))
    assert slowed.status_code == 429
    assert slowed.json()["error"]["code"] == "too_many_failed_attempts"
    assert int(slowed.headers["retry-after"]) > 0
    assert status("sk-second") == 429  # a guess may be right: it is not looked at
    assert status("sk-first") == 200


def test_a_missing_key_is_no_guess(server: LiveServer) -> None:
    for _ in range(2 * ALLOWED):
        assert httpx.get(server.url + "/v1/models").status_code == 401
    assert httpx.get(server.url + "/v1/models", headers=bearer("sk-first")).status_code == 200


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    return str(tmp_path / "keys.json")


def manage(key_file: str, line: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert keys.main(["--key-file", key_file, *line.split()]) == 0
    return capsys.readouterr().out.strip()


def test_the_key_file_is_followed_and_streams_live_on(
    key_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    alice = manage(key_file, "add alice", capsys)
    wait = Wait()
    engine = ScriptedEngine(script=[*words("a", "b")[:1], wait, *words("c")])
    app = create_app(Settings(key_file=key_file), serving(engine), key_file=KeyFile(key_file))
    with live(app) as server, RawClient(server.port) as client:

        def status(key: str) -> int:
            return httpx.get(server.url + "/v1/models", headers=bearer(key)).status_code

        def within_two_seconds(key: str, expected: int) -> bool:
            """Asking all the time would look like guessing."""
            for _ in range(8):
                if status(key) == expected:
                    return True
                time.sleep(0.25)
            return False

        body = json.dumps({**ASK, "stream": True}).encode()
        client.post(CHAT, body, "Content-Type: application/json", f"Authorization: Bearer {alice}")
        client.read_until(b'"content":"a"')
        bob = manage(key_file, "add bob", capsys)
        assert within_two_seconds(bob, 200)
        newer = manage(key_file, "rotate alice", capsys)
        assert within_two_seconds(newer, 200)
        assert status(alice) == 200
        manage(key_file, "revoke alice", capsys)
        assert within_two_seconds(alice, 401)
        assert status(newer) == 401
        server.loop.call_soon_threadsafe(wait.go.set)
        assert b"[DONE]" in client.read_until(b"[DONE]")
        Path(key_file).write_text("nonsense")
        assert not within_two_seconds(bob, 401)


def test_a_reload_reads_the_key_file_again(
    key_file: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """And tells again what is wrong with it."""
    manage(key_file, "add alice", capsys)
    state = serving(ScriptedEngine())
    app = create_app(Settings(key_file=key_file), state, key_file=KeyFile(key_file))
    with live(app) as server:
        Path(key_file).write_text("nonsense")
        assert eventually(lambda: len(caplog.records) == 1)

        def told_again() -> bool:
            server.loop.call_soon_threadsafe(state.reload.give)
            return len(caplog.records) > 1

        assert eventually(told_again)
    assert "is not valid: Invalid JSON" in caplog.records[1].message


def test_a_file_without_keys_opens_nothing(
    key_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    manage(key_file, "add alice", capsys)
    manage(key_file, "revoke alice", capsys)
    app = create_app(
        Settings(key_file=key_file), serving(ScriptedEngine()), key_file=KeyFile(key_file)
    )
    with live(app) as server:
        assert httpx.get(server.url + "/v1/models").status_code == 401


def test_a_key_may_be_for_some_models_only(
    key_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = manage(key_file, "add own --models openchat_3.6", capsys)
    other = manage(key_file, "add other --models llama", capsys)
    app = create_app(
        Settings(key_file=key_file), serving(ScriptedEngine()), key_file=KeyFile(key_file)
    )
    with live(app) as server:
        for key, status, listed in ((own, 200, 2), (other, 403, 0)):
            answer = httpx.post(server.url + CHAT, json=ASK, headers=bearer(key))
            assert answer.status_code == status
            models = httpx.get(server.url + "/v1/models", headers=bearer(key)).json()["data"]
            assert len(models) == listed
        assert answer.json()["error"]["code"] == "model_not_allowed"
        card = httpx.get(server.url + "/v1/models/openchat_3.6", headers=bearer(other))
        assert card.status_code == 404
