"""Hostile schemas and grammars over a socket: each is a 400, and the next request a 200."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from ochat_serve.app import create_app
from ochat_serve.grammar import Trial, TriedGrammars
from ochat_serve.settings import Settings
from tests.fakes import ScriptedEngine, serving
from tests.hostile_grammars import HOSTILE, schema
from tests.live import LiveServer, live

ASK = {"messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"


@dataclass
class Guarded:
    server: LiveServer
    engine: ScriptedEngine

    def post(self, **fields: object) -> httpx.Response:
        return httpx.post(self.server.url + CHAT, json={**ASK, **fields}, timeout=60)


@pytest.fixture(scope="module")
def guarded(demo_folder: Path) -> Iterator[Guarded]:
    engine = ScriptedEngine()
    grammars = TriedGrammars(Trial(str(demo_folder), vocab_size=49152, compact_json=True))
    with live(create_app(Settings(), serving(engine, grammars=grammars))) as server:
        yield Guarded(server, engine)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_400_and_then_a_200(guarded: Guarded, name: str) -> None:
    fields, reason = HOSTILE[name]
    before = len(guarded.engine.requests)
    refused = guarded.post(**fields)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert reason in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(next(iter(fields)))
    assert len(error["message"]) < 500
    assert len(guarded.engine.requests) == before
    assert guarded.post().status_code == 200
    assert guarded.post(**schema({"type": "string"})).status_code == 200


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 20
