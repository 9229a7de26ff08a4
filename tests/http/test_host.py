"""On a loopback address, requests that were meant for another host are refused."""

import httpx
import pytest

from ochat_serve.app import create_app
from ochat_serve.settings import Settings
from tests.fakes import ScriptedEngine, serving
from tests.live import RawClient, live

OURS = ["localhost", "localhost:18888", "LOCALHOST", "localhost.", "127.0.0.1", "127.8.9.1:80",
        "[::1]", "[::1]:18888"]  # fmt: skip
OTHERS = ["evil.example", "evil.example:18888", "localhost.evil.example", "127.0.0.1.nip.io",
          "10.0.0.1", "[::2]", "", ":18888", "[", "\xff"]  # fmt: skip


def status(settings: Settings, host: str) -> int:
    with live(create_app(settings, serving(ScriptedEngine()))) as server:
        headers = {b"host": host.encode("latin-1")}
        return httpx.get(server.url + "/v1/models", headers=headers).status_code


@pytest.mark.parametrize("host", OURS)
def test_this_machine(host: str) -> None:
    assert status(Settings(), host) == 200


@pytest.mark.parametrize("host", OTHERS)
def test_another_host(host: str) -> None:
    """With a key it would be 401: what is said of this server, strangers' pages may not read."""
    assert status(Settings(), host) == 400


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        (Settings(allowed_hosts=("chat.example",)), 200),
        (Settings(allowed_hosts=("*",)), 200),
        (Settings(allowed_hosts=("other.example",)), 400),
        (Settings(host="0.0.0.0", insecure_no_auth=True), 200),
    ],
)
def test_names_can_be_allowed(settings: Settings, answer: int) -> None:
    assert status(settings, "Chat.Example:443") == answer


def test_the_error_says_what_to_do_and_an_old_client_may() -> None:
    with live(create_app(Settings(), serving(ScriptedEngine()))) as server:
        answer = httpx.get(server.url + "/", headers={"host": "evil.example"})
        assert answer.json()["error"]["code"] == "invalid_host"
        assert "--allowed-hosts" in answer.json()["error"]["message"]
        assert "x-request-id" in answer.headers
        with RawClient(server.port) as client:
            client.send(b"GET /v1/models HTTP/1.0\r\n\r\n")
            assert b" 200 " in client.read_until(b"\r\n")
