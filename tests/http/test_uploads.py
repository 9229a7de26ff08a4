"""Bodies that come at the same time, as clients see it."""

import contextlib
import json
from collections.abc import Iterator

import pytest

from ochat_serve.app import create_app
from ochat_serve.routes.uploads import BODIES
from ochat_serve.settings import Settings
from tests.fakes import ScriptedEngine, serving, words
from tests.http.test_bounds import refusal
from tests.live import LiveServer, RawClient, eventually, live

CHAT = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "one two"}]}).encode()
MAX_BYTES = 1_000
# One key alone may fill half of all.
FILLS = BODIES // 2


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(script=words("done"))


@pytest.fixture
def server(engine: ScriptedEngine) -> Iterator[LiveServer]:
    settings = Settings(api_keys=("sk-a", "sk-b"), max_body_mb=MAX_BYTES / 2**20)
    with live(create_app(settings, serving(engine))) as running:
        yield running


def head(key: str, size: int) -> bytes:
    lines = (f"POST {CHAT} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {key}")
    kinds = ("Content-Type: application/json", f"Content-Length: {size}", "", "")
    return "\r\n".join((*lines, *kinds)).encode()


def begin(client: RawClient, key: str) -> None:
    """The largest body, but for its last byte."""
    client.send(head(key, MAX_BYTES) + BODY.ljust(MAX_BYTES - 1))


def asked(server: LiveServer, key: str) -> int:
    """The status of a small request, with the whole answer."""
    with RawClient(server.port) as client:
        client.send(head(key, len(BODY)) + BODY)
        return int(client.read_until(b"}}").split()[1])


def test_one_key_cannot_fill_the_memory_with_bodies(
    server: LiveServer, engine: ScriptedEngine
) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(server.port)) for _ in range(FILLS)]
        for client in clients:
            begin(client, "sk-a")
        assert eventually(lambda: asked(server, "sk-a") == 503)
        assert asked(server, "sk-b") == 200
        with RawClient(server.port) as another:
            begin(another, "sk-a")
            another.send(b" ")  # the answer comes after the body
            status, error = refusal(another)
            assert (status, error["code"]) == (503, "overloaded")
            assert b"retry-after: 1\r\n" in another.received
        for client in clients:  # those that are held are answered
            client.send(b" ")
            assert client.read_until(b'"usage"').startswith(b"HTTP/1.1 200")
        assert asked(server, "sk-a") == 200


@pytest.mark.parametrize("end", ["hang up", "too large", "no JSON"])
def test_what_was_held_is_given_back_however_it_ends(server: LiveServer, end: str) -> None:
    ends = {"too large": MAX_BYTES + 1, "no JSON": MAX_BYTES}
    for _ in range(FILLS + 1):
        with RawClient(server.port) as client:
            if end == "hang up":
                begin(client, "sk-a")
            else:
                client.send(head("sk-a", ends[end]) + b"x" * ends[end])
                client.read_until(b"}}")
    assert eventually(lambda: server.connections == 0)
    with contextlib.ExitStack() as stack:
        for _ in range(FILLS - 1):
            begin(stack.enter_context(RawClient(server.port)), "sk-a")
        assert eventually(lambda: server.connections == FILLS - 1)
        assert asked(server, "sk-a") == 200
