"""The ready gateways of configs/: the real programs in front of a real server."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import Request, Response
from openai import OpenAI

from ochat_serve.app import create_app
from ochat_serve.generation import Delta, Update
from ochat_serve.server import KEEP_ALIVE_TIMEOUT_S
from ochat_serve.settings import Settings
from tests.certificates import Authority
from tests.fakes import ScriptedEngine, Wait, serving, words
from tests.gateways.programs import CONFIGS, PROGRAMS, Place, gateway
from tests.live import LiveServer, RawClient, eventually, live
from tests.process import free_port
from tests.request_log.files import request_log

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "one two"}], "stream": True}
CLIENT = "127.0.0.2"  # not the gateway's address
MIB = 2**20


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def server(engine: ScriptedEngine, tmp_path: Path) -> Iterator[LiveServer]:
    settings = Settings()
    log = request_log(tmp_path / "requests.log")
    app = create_app(settings, serving(engine, settings), log)

    @app.get("/v1/seen")
    async def seen(request: Request) -> dict[str, object]:
        version = request.scope["http_version"]
        return {"scheme": request.url.scheme, "http": version, **dict(request.headers)}

    @app.get("/v1/accel")
    async def accel() -> Response:
        return Response("plain", headers={"x-accel-redirect": "/v1/models"})

    with live(app, closing=(log,)) as running:
        yield running


@pytest.fixture(params=PROGRAMS)
def place(
    request: pytest.FixtureRequest, server: LiveServer, authority: Authority, tmp_path: Path
) -> Iterator[Place]:
    with gateway(request.param, authority, server.port, tmp_path / "gateway") as running:
        yield running


@pytest.fixture
def client(place: Place, authority: Authority) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(verify=authority.context, local_address=CLIENT)
    with httpx.Client(transport=transport, base_url=place.url, timeout=20) as known:
        yield known


def logged(tmp_path: Path, count: int) -> list[dict[str, object]]:
    file = tmp_path / "requests.log"
    assert eventually(lambda: file.read_text().count("\n") >= count)
    return [json.loads(line) for line in file.read_text().splitlines()]


def events(text: str) -> list[str]:
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith('data: {"id"')]
    return [c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"]]


def test_events_come_one_by_one(
    client: httpx.Client, server: LiveServer, engine: ScriptedEngine
) -> None:
    waits = [Wait(), Wait()]
    first, second = (Update([Delta(0, text, 1)]) for text in "ab")
    engine.script = [first, waits[0], second, waits[1], *words("c")]
    received = ""
    with client.stream("POST", CHAT, json=ASK) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        parts = answer.iter_text()
        for text, wait in zip("ab", waits, strict=True):
            while f'"content":"{text}"' not in received:
                received += next(parts)
            assert engine.running == 1, "the next one has not been made"
            server.loop.call_soon_threadsafe(wait.go.set)
        received += "".join(parts)
    assert events(received) == ["", "a", "b", "c", ""]
    assert received.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_frees_the_slot_over_http_1(
    place: Place, authority: Authority, engine: ScriptedEngine, stream: bool, tmp_path: Path
) -> None:
    engine.script = [*(Update([Delta(0, "a", 1)]) for _ in range(3)), Wait()]
    with RawClient(place.https, tls=authority.context) as client:
        client.post(CHAT, json.dumps({**ASK, "stream": stream}).encode())
        if stream:
            client.read_until(b'"content":"a"')
        assert eventually(lambda: engine.running == 1)
    assert eventually(lambda: engine.running == 0)
    assert [line["outcome"] for line in logged(tmp_path, 1)] == ["abandoned"]


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_frees_the_slot_over_http_2(
    place: Place, authority: Authority, engine: ScriptedEngine, stream: bool, tmp_path: Path
) -> None:
    engine.script = [*(Update([Delta(0, "a", 1)]) for _ in range(3)), Wait()]
    body = json.dumps({**ASK, "stream": stream})
    process = subprocess.Popen(
        ["curl", "-sSN", "--http2", "--cacert", authority.file, "--json", body, place.url + CHAT],
        stdout=subprocess.PIPE,
    )
    try:
        if stream:
            assert process.stdout is not None
            process.stdout.readline()
        assert eventually(lambda: engine.running == 1)
    finally:
        process.kill()
        process.communicate()
    assert eventually(lambda: engine.running == 0)
    assert [line["outcome"] for line in logged(tmp_path, 1)] == ["abandoned"]


def test_clients_get_http_2(place: Place, authority: Authority) -> None:
    curl = ["curl", "-sS", "--http2", "--cacert", str(authority.file)]
    answer = subprocess.run(
        [*curl, "-w", "\n%{http_version} %{http_code}", place.url + "/v1/seen"],
        capture_output=True,
        text=True,
        check=True,
    )
    body, last = answer.stdout.split("\n")
    assert last == "2 200"
    assert json.loads(body)["http"] == "1.1"


def test_the_client_is_the_real_one_whatever_it_says(client: httpx.Client, tmp_path: Path) -> None:
    lies = {
        "x-forwarded-for": "203.0.113.7",
        "x-forwarded-proto": "http",
        "x-real-ip": "203.0.113.7",
        "forwarded": "for=203.0.113.7;proto=http",
    }
    assert client.get("/v1/models").status_code == 200
    seen = client.get("/v1/seen", headers=lies).json()
    assert seen["scheme"] == "https"
    assert seen["x-forwarded-for"] == CLIENT
    assert [line["client"] for line in logged(tmp_path, 2)] == [CLIENT, CLIENT]


def test_the_servers_own_name_is_asked_for(client: httpx.Client) -> None:
    """On a loopback address it accepts no other."""
    host = client.get("/v1/seen").json()["host"]
    assert host.partition(":")[0] in ("localhost", "127.0.0.1")


def test_the_numbers_fit_the_servers() -> None:
    texts = [(CONFIGS / name).read_text() for name in ("Caddyfile", "nginx.conf")]
    for text in texts:
        (limit,) = re.findall(r"max(?:_body)?_size (\d+)", text)
        assert int(limit) > Settings().max_body_mb
        (kept_s,) = re.findall(r"keepalive(?:_timeout)? (\d+)s", text)
        assert int(kept_s) < KEEP_ALIVE_TIMEOUT_S


def test_headers_of_an_answer_command_nothing(client: httpx.Client) -> None:
    assert client.get("/v1/accel").text == "plain"


def test_the_connection_to_the_server_is_kept(client: httpx.Client, server: LiveServer) -> None:
    assert client.post(CHAT, json={**ASK, "stream": False}).status_code == 200
    kept = server.transports
    for _ in range(3):
        assert "[DONE]" in client.post(CHAT, json=ASK).text
        assert client.get("/v1/models").status_code == 200
    assert len(kept) == 1
    assert server.transports == kept


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("size", "status", "by_server"),
    [(3 * MIB, 400, True), (int(4.5 * MIB), 413, True), (6 * MIB, 413, False)],
)
def test_a_body_that_is_too_large_is_a_413_by_whoever_sees_it(
    client: httpx.Client, place: Place, size: int, status: int, by_server: bool, chunked: bool
) -> None:
    """Up to 4 MiB the server reads it (and finds no JSON)."""
    pieces = [b"x" * 2**16] * (size // 2**16)
    answer = client.post(
        CHAT,
        content=iter(pieces) if chunked else b"".join(pieces),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert ("x-request-id" in answer.headers) == by_server
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert "temporary file" not in place.output, "prompts stay in memory"


def test_without_a_server_the_gateways_own_errors_look_like_the_servers(
    authority: Authority, tmp_path: Path
) -> None:
    for name in PROGRAMS:
        with (
            gateway(name, authority, free_port(), tmp_path / name) as place,
            httpx.Client(verify=authority.context) as client,
        ):
            answer = client.get(place.url + "/v1/models")
        assert answer.status_code == 502
        assert answer.headers["content-type"] == "application/json"
        error = answer.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("server_error", None, None)


def test_plain_http_is_sent_on_to_https(place: Place) -> None:
    answer = httpx.get(f"http://localhost:{place.http}/v1/models")
    assert answer.status_code == 308
    assert answer.headers["location"].startswith("https://localhost")
    assert answer.headers["location"].endswith("/v1/models")


def test_openais_sdk_through_the_gateway(place: Place, authority: Authority) -> None:
    with httpx.Client(verify=authority.context) as http:
        client = OpenAI(base_url=place.url + "/v1", api_key="x", http_client=http, max_retries=0)
        stream = client.chat.completions.create(
            model="openchat_3.6", messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hi!"
