"""Closed to browsers elsewhere unless opened, and then right on every answer."""

import httpx

from ochat_serve.app import create_app
from ochat_serve.settings import Settings
from tests.fakes import ScriptedEngine, serving
from tests.live import live

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
