"""Behind a gateway: whose word is taken for who the client is, and under which path."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from ochat_serve.app import create_app
from ochat_serve.middleware.gateway import Gateway
from ochat_serve.settings import Settings
from tests.fakes import ScriptedEngine, serving
from tests.live import eventually, live
from tests.request_log.files import request_log

GATEWAY = "10.0.0.1"
CLIENT = "203.0.113.7"
ELSEWHERE = "198.51.100.9"


async def seen(
    settings: Settings, peer: tuple[str, int] | None, *headers: tuple[str, str], path: str = "/"
) -> Scope:
    """The scope that the app gets."""
    scopes = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)

    gateway = Gateway(app, settings.forwarded_allow_ips, settings.root_path)
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"type": "http", "client": peer, "scheme": "http", "path": path, "headers": raw}
    await gateway(scope, None, None)  # type: ignore[arg-type]
    return scopes[0]


def forwarded_for(*lines: str) -> list[tuple[str, str]]:
    return [("x-forwarded-for", line) for line in lines]


@pytest.mark.parametrize(
    ("lines", "client"),
    [
        ([], GATEWAY),
        ([CLIENT], CLIENT),
        ([f" {CLIENT} "], CLIENT),
        # What the client itself wrote stands to the left of its address.
        ([f"{ELSEWHERE}, {CLIENT}"], CLIENT),
        ([f"{GATEWAY}, {CLIENT}"], CLIENT),
        ([ELSEWHERE, CLIENT], CLIENT),
        (["nonsense, <script>", CLIENT], CLIENT),
        # Several gateways, each trusted.
        ([f"{ELSEWHERE}, {CLIENT}, 10.0.0.2, 10.0.0.3"], CLIENT),
        ([f"{CLIENT}", "10.0.0.2"], CLIENT),
        (["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        # An address that is none ends the way at the last one that is.
        (["unknown"], GATEWAY),
        ([""], GATEWAY),
        (["{'a': 1}\xff"], GATEWAY),
        ([f"{CLIENT}, unknown"], GATEWAY),
        ([f"{CLIENT}, unknown, 10.0.0.2"], "10.0.0.2"),
        ([f"{CLIENT},"], GATEWAY),
        (["1.2.3"], GATEWAY),
        # Ports, brackets, zones, and the long way to write an address.
        ([f"{CLIENT}:1234"], CLIENT),
        (["[2001:db8::1]:1234"], "2001:db8::1"),
        (["[2001:db8::1]"], "2001:db8::1"),
        (["2001:DB8:0::1"], "2001:db8::1"),
        (["fe80::1%a <script>"], "fe80::1"),
        ([f"::ffff:{CLIENT}"], CLIENT),
        ([f"{CLIENT}, ::ffff:10.0.0.2"], CLIENT),
    ],
)
async def test_the_client_is_read_from_the_right(lines: list[str], client: str) -> None:
    settings = Settings(forwarded_allow_ips=("10.0.0.0/8",))
    scope = await seen(settings, (GATEWAY, 1), *forwarded_for(*lines))
    assert scope["client"][0] == client


@pytest.mark.parametrize("peer", [(ELSEWHERE, 1), ("2001:db8::1", 1), ("local", 1), None])
async def test_nobody_else_is_believed(peer: tuple[str, int] | None) -> None:
    told = [*forwarded_for(CLIENT), ("x-forwarded-proto", "https"), ("x-real-ip", CLIENT)]
    told.append(("forwarded", f"for={CLIENT};proto=https"))
    scope = await seen(Settings(forwarded_allow_ips=("10.0.0.0/8",)), peer, *told)
    assert (scope["client"], scope["scheme"]) == (peer, "http")


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1"])
async def test_this_machine_is_believed_unless_nobody_is(peer: str) -> None:
    """A gateway beside the server needs no flag."""
    told = forwarded_for(CLIENT)
    assert (await seen(Settings(), (peer, 1), *told))["client"] == (CLIENT, 0)
    nobody = Settings(forwarded_allow_ips=())
    assert (await seen(nobody, (peer, 1), *told))["client"] == (peer, 1)
    assert (await seen(Settings(), ("127.0.0.2", 1), *told))["client"] == ("127.0.0.2", 1)


@pytest.mark.parametrize(
    ("values", "scheme"),
    [(["https"], "https"), (["http"], "http"), (["http, https"], "https"),
     (["http", "https"], "https"), (["wss"], "http"), (["https,"], "http"), ([], "http")],
)  # fmt: skip
async def test_the_scheme_is_the_last_that_was_said(values: list[str], scheme: str) -> None:
    told = [("x-forwarded-proto", value) for value in values]
    assert (await seen(Settings(), ("127.0.0.1", 1), *told))["scheme"] == scheme


@pytest.mark.parametrize(
    ("path", "left"),
    [
        ("/llm/v1/models", "/v1/models"),
        ("/llm/", "/"),
        ("/v1/models", "/v1/models"),
        ("/llm", "/llm"),
        ("/llmx/v1", "/llmx/v1"),
        ("/llm/llm/v1", "/llm/v1"),
        ("//llm/v1", "//llm/v1"),
    ],
)
async def test_a_path_in_front_is_taken_off_once(path: str, left: str) -> None:
    settings = Settings(root_path="/llm/")
    assert (await seen(settings, None, path=path))["path"] == left
    assert (await seen(Settings(), None, path=path))["path"] == path


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    return tmp_path / "requests.log"


@pytest.fixture
def url(log_file: Path) -> Iterator[str]:
    settings = Settings(root_path="/llm", admin_keys=("sk-a",), allowed_origins=("https://a.b",))
    log = request_log(log_file)
    app = create_app(settings, serving(ScriptedEngine(), settings), log)
    with live(app, closing=(log,)) as server:
        yield server.url


def ask(url: str, path: str, **headers: str) -> int:
    return httpx.get(url + path, headers={"authorization": "Bearer sk-a", **headers}).status_code


def test_the_log_has_what_a_trusted_gateway_says(url: str, log_file: Path) -> None:
    said = {"x-forwarded-for": f"{ELSEWHERE}, {CLIENT}"}
    assert ask(url, "/v1/models", **said) == 200
    with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2")) as stranger:
        assert stranger.get(url + "/v1/models", headers=said).status_code == 401
    assert eventually(lambda: log_file.read_text().count("\n") == 2)
    lines = [json.loads(line) for line in log_file.read_text().splitlines()]
    assert [line["client"] for line in lines] == [CLIENT, "127.0.0.2"]


def test_below_a_path_every_guard_sees_the_path_as_routed(url: str, log_file: Path) -> None:
    for path in ("/v1/models", "/llm/v1/models"):
        assert ask(url, path) == 200
        assert httpx.get(url + path).status_code == 401
    assert httpx.get(url + "/llm/livez").status_code == 200
    assert ask(url, "/llm/llm/v1/models") == 404
    assert ask(url, "/other/v1/models") == 404
    key = {"authorization": "Bearer sk-a"}
    described = httpx.get(url + "/llm/openapi.json", headers=key).json()
    assert described["servers"] == [{"url": "/llm"}]
    preflight = {"origin": "https://a.b", "access-control-request-method": "POST"}
    assert httpx.options(url + "/llm/v1/models", headers=preflight).status_code == 200
    assert eventually(lambda: log_file.read_text().count("\n") == 4)
    lines = [json.loads(line) for line in log_file.read_text().splitlines()]
    assert [line["path"] for line in lines] == ["/v1/models"] * 4
