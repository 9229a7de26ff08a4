"""One error body, whatever went wrong and wherever."""

import asyncio
import json

import httpx
import pytest
from pydantic import ValidationError

from ochat_serve.app import create_app
from ochat_serve.protocol.chat import ChatCompletionRequest
from ochat_serve.serving import Serving
from ochat_serve.settings import Settings
from tests.fakes import ScriptedEngine, serving
from tests.live import LiveServer, RawClient, eventually, live

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
ASK = {"messages": [{"role": "user", "content": "x"}]}


@pytest.fixture(scope="module")
def server() -> LiveServer:
    settings = Settings(max_body_mb=0.01)
    with live(create_app(settings, serving(ScriptedEngine(), settings))) as running:
        yield running


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status", "code", "param"),
    [
        ("GET", "/nowhere", {}, b"", 404, None, None),
        ("GET", "/v1/models/gpt-4", {}, b"", 404, "model_not_found", "model"),
        ("GET", "/v1/models/", {}, b"", 404, "model_not_found", "model"),
        ("GET", CHAT, {}, b"", 405, None, None),
        ("POST", "/livez", {}, b"", 405, None, None),
        ("POST", CHAT, JSON, b"x" * 20_000, 413, None, None),
        ("POST", CHAT, {"content-type": "text/plain"}, b"{}", 415, None, None),
        ("POST", CHAT, {}, b"{}", 415, None, None),
        ("POST", CHAT, JSON, b"", 400, None, None),
        ("POST", CHAT, JSON, b"{", 400, None, None),
        ("POST", CHAT, JSON, b"[]", 400, None, None),
        ("POST", CHAT, JSON, b"null", 400, None, None),
        ("POST", CHAT, JSON, b"\xff\xfe", 400, None, None),
        ("POST", CHAT, JSON, b"[" * 5_000, 400, None, None),
        ("POST", CHAT, JSON, b'{"messages": []}', 400, "invalid_value", "messages"),
        ("POST", CHAT, JSON, b"{}", 400, None, "messages"),
    ],
)
def test_error_body(
    server: LiveServer,
    method: str,
    path: str,
    headers: dict[str, str],
    body: bytes,
    status: int,
    code: str | None,
    param: str | None,
) -> None:
    answer = httpx.request(method, server.url + path, headers=headers, content=body)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
    assert error["message"]
    for internal in ("pydantic", "Traceback", "object at 0x", "type=", "input_value"):
        assert internal not in answer.text


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nno header\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
    ],
)
def test_what_is_no_http_gets_the_same_body(server: LiveServer, request_bytes: bytes) -> None:
    with RawClient(server.port) as client:
        client.send(request_bytes)
        answer = client.read_until(b"}}")
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_a_body_survives_an_offer_of_http2(server: LiveServer) -> None:
    """curl --http2 and Java's client send it with the first request."""
    body = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
    with RawClient(server.port) as client:
        client.post(CHAT, body, "Content-Type: application/json", *offer)
        assert b"HTTP/1.1 200 OK" in client.read_until(b'"usage"')


def test_many_wrong_items_cost_no_more_than_one() -> None:
    """pydantic would otherwise describe each of a million errors."""
    bodies = [
        {"messages": [0] * 2_000},
        {"messages": [{"role": "user", "content": "x"}] * 3_000},
        {"messages": [{"role": "user", "content": [0] * 3_000}]},
        {**ASK, "logit_bias": dict.fromkeys(map(str, range(3_000)), "")},
        {**ASK, "metadata": dict.fromkeys(map(str, range(3_000)), 0)},
        {**ASK, "stop": [0] * 3_000},
    ]
    for body in bodies:
        with pytest.raises(ValidationError) as caught:
            ChatCompletionRequest.model_validate_json(json.dumps(body))
        assert caught.value.error_count() == 1


def test_probes_may_ask_for_the_head_alone(server: LiveServer) -> None:
    for path in ("/livez", "/readyz", "/health"):
        assert httpx.head(server.url + path).status_code == 200


def test_405_names_the_methods_that_are_allowed(server: LiveServer) -> None:
    assert httpx.delete(server.url + CHAT).headers["allow"] == "POST"


def test_chunked_body_is_bounded_too(server: LiveServer) -> None:
    def forever():
        for _ in range(100):
            yield b"x" * 1_000

    answer = httpx.post(server.url + CHAT, headers=JSON, content=forever())
    assert answer.status_code == 413


def test_a_body_that_is_never_finished_leaves_nothing_behind(server: LiveServer) -> None:
    with RawClient(server.port) as client:
        client.send(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n"
            b"Content-Type: application/json\r\n\r\n{"
        )
    assert httpx.get(server.url + "/readyz").status_code == 200


def test_metrics_are_the_engines_in_prometheus_format(server: LiveServer) -> None:
    answer = httpx.get(server.url + "/metrics")
    assert answer.text == "vllm:requests 1\n"
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_the_chat_route_is_described_like_the_others(server: LiveServer) -> None:
    paths = httpx.get(server.url + "/openapi.json").json()["paths"]
    assert "post" in paths["/v1/chat/completions"]
    assert "get" in paths["/v1/models"]


def test_while_loading_chat_and_readiness_say_so_and_liveness_is_fine() -> None:
    with live(create_app(Settings(), Serving(phase="loading the weights"))) as server:
        chat = httpx.post(server.url + CHAT, json={"messages": [{"role": "user", "content": "x"}]})
        models = httpx.get(server.url + "/v1/models")
        ready = httpx.get(server.url + "/readyz")
        live_answer = httpx.get(server.url + "/livez")
        version = httpx.get(server.url + "/version")
    for answer in (chat, models):
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        assert answer.json()["error"]["code"] == "loading"
        assert "loading the weights" in answer.json()["error"]["message"]
    assert ready.status_code == 503
    assert ready.json()["phase"] == "loading the weights"
    assert live_answer.json() == {"status": "alive"}
    assert version.json()["vllm"] is None


def test_a_dead_engine_is_not_ready() -> None:
    engine = ScriptedEngine()
    with live(create_app(Settings(), serving(engine))) as server:
        assert httpx.get(server.url + "/health").status_code == 200
        engine.failure = "The engine process has died."
        ready = httpx.get(server.url + "/health")
        chat = httpx.post(server.url + CHAT, json={"messages": [{"role": "user", "content": "x"}]})
        assert httpx.get(server.url + "/livez").status_code == 200
    assert ready.status_code == chat.status_code == 503
    assert chat.json()["error"]["code"] == "engine_dead"


def test_a_stalled_engine_is_not_ready_until_it_moves_again() -> None:
    """Found by the server itself, while nothing is asked of it."""
    engine = ScriptedEngine(answers=asyncio.Event())
    app = create_app(Settings(), serving(engine, Settings(stall_s=0.2)))
    with live(app) as server:
        assert httpx.get(server.url + "/readyz").status_code == 200
        assert eventually(lambda: httpx.get(server.url + "/readyz").status_code == 503)
        ready = httpx.get(server.url + "/readyz")
        chat = httpx.post(server.url + CHAT, json={"messages": [{"role": "user", "content": "x"}]})
        assert httpx.get(server.url + "/livez").status_code == 200
        assert httpx.get(server.url + "/metrics").status_code == 200
        server.loop.call_soon_threadsafe(engine.answers.set)
        assert eventually(lambda: httpx.get(server.url + "/readyz").status_code == 200)
    assert ready.json()["status"] == chat.json()["error"]["code"] == "stalled"
    assert ready.headers["retry-after"] == chat.headers["retry-after"] == "10"
    assert "0.2 seconds" in ready.json()["reason"]
    assert engine.requests == []


def test_models_list_every_name_the_default_first(server: LiveServer) -> None:
    models = httpx.get(server.url + "/v1/models").json()
    names = [model["id"] for model in models["data"]]
    assert names == ["openchat_3.6", "openchat/openchat-3.6-8b-20240522"]
    for name in names:
        model = httpx.get(f"{server.url}/v1/models/{name}").json()
        assert model == next(card for card in models["data"] if card["id"] == name)
        assert model["owned_by"] == "openchat"
        assert model["max_model_len"] == 100
