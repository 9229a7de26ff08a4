"""With keys set, nothing but liveness answers without one."""

import httpx
import pytest

from ochat_serve.app import create_app
from ochat_serve.settings import Settings
from tests.fakes import ScriptedEngine, serving
from tests.live import LiveServer, RawClient, live

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


@pytest.fixture(scope="module")
def server() -> LiveServer:
    settings = Settings(api_keys=KEYS)
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
            client.send(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
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
