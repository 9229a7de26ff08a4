"""Closed to browsers elsewhere unless opened, and then right on every answer."""

from email import message_from_bytes
from email.message import Message

import httpx
import pytest

from ochat_serve.app import create_app
from ochat_serve.server import protocol
from ochat_serve.settings import Settings
from tests.fakes import ScriptedEngine, serving
from tests.live import RawClient, live

ORIGIN = "https://chat.example"
CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "x"}]}
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


def test_closed_by_default() -> None:
    with live(create_app(Settings(), serving(ScriptedEngine()))) as server:
        answer = httpx.post(server.url + CHAT, json=ASK, headers={"origin": ORIGIN})
        preflight = httpx.options(server.url + CHAT, headers=PREFLIGHT)
    assert "access-control-allow-origin" not in answer.headers
    assert "access-control-allow-origin" not in preflight.headers


def test_opened_it_is_right_on_preflight_streams_and_errors() -> None:
    settings = Settings(allowed_origins=(ORIGIN,), api_keys=("sk-a",))
    key = {"authorization": "Bearer sk-a", "origin": ORIGIN}
    engine = ScriptedEngine()
    with live(create_app(settings, serving(engine, settings))) as server:
        preflight = httpx.options(server.url + CHAT, headers=PREFLIGHT)
        stream = httpx.post(server.url + CHAT, json={**ASK, "stream": True}, headers=key)
        denied = httpx.post(server.url + CHAT, json=ASK, headers={"origin": ORIGIN})
        invalid = httpx.post(server.url + CHAT, json={}, headers=key)
        engine.script = [ZeroDivisionError()]
        broken = httpx.post(server.url + CHAT, json=ASK, headers=key)
        stranger = httpx.options(server.url + CHAT, headers={**PREFLIGHT, "origin": "https://x.y"})
    assert preflight.status_code == 200
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    statuses = [answer.status_code for answer in (stream, denied, invalid, broken)]
    assert statuses == [200, 401, 400, 500]
    for answer in (preflight, stream, denied, invalid, broken):
        assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "access-control-allow-origin" not in stranger.headers
    assert stranger.status_code == 400
    assert stranger.json()["error"]["code"] == "cors_refused"
    assert stranger.headers["vary"] == preflight.headers["vary"]


def refused(said: bytes, *origins: str) -> Message:
    """Head of the answer that the connection itself gives."""
    settings = Settings(allowed_origins=origins, read_timeout_s=0.2)
    app = create_app(settings, serving(ScriptedEngine()))
    with live(app, protocol(app, settings)) as server, RawClient(server.port) as client:
        client.send(said)
        head, _, _ = client.read_until(b"\r\n\r\n").partition(b"\r\n\r\n")
    return message_from_bytes(head.partition(b"\r\n")[2])


FROM_PAGE = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nOrigin: {ORIGIN}\r\n".encode()
HALF_SENT = FROM_PAGE + b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
UNREAD = FROM_PAGE + b"x: " + b"y" * 20_000
ALLOWED = "access-control-allow-origin"


@pytest.mark.parametrize("said", [HALF_SENT, UNREAD], ids=["408", "431"])
def test_a_page_may_read_what_the_connection_itself_answers(said: bytes) -> None:
    head = refused(said, ORIGIN)
    assert (head[ALLOWED], head["vary"]) == (ORIGIN, "Origin")
    assert "retry-after" in head["access-control-expose-headers"]
    assert refused(said, "*")[ALLOWED] == "*"
    assert refused(said, "https://x.y", "https://y.x")[ALLOWED] is None
    assert refused(said)[ALLOWED] is None


def test_of_several_origins_it_answers_the_one_that_asked() -> None:
    assert refused(HALF_SENT, "https://x.y", ORIGIN)[ALLOWED] == ORIGIN
    assert refused(UNREAD, "https://x.y", ORIGIN)[ALLOWED] is None, "it was not read"
    assert refused(HALF_SENT, "https://x.y")[ALLOWED] is None
