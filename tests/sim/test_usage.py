"""Two front ends, one ledger, and a real engine: the accounts are the sums of the log."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ochat_serve.usage.counters import Row
from ochat_serve.usage.database import sqlite_database
from tests.live import RawClient, eventually
from tests.process import ROOT, ServerProcess, server_process
from tests.usage.accounts import EVER, sums

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 30, "ignore_eos": True}
KEYS = {"key-1": "sk-a", "key-2": "sk-b"}


@pytest.fixture
def server(llama3_folder: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    with server_process(
        "--model", str(llama3_folder),
        "--api-server-count", "2",
        "--api-keys", *KEYS.values(),
        # The second event of a stream is seconds away.
        "--stream-period", "1000",
        "--usage-db", str(tmp_path / "usage"),
        "--log-file", str(tmp_path / "requests.log"),
        "--distributed-executor-backend", "sim_executor.SimExecutor",
        output=tmp_path / "output.txt",
        PYTHONPATH=str(ROOT / "scripts" / "benchmark" / "sim"),
        SIM_STEP_MS="5",
    ) as running:  # fmt: skip
        running.wait_until_ready("sk-a")
        assert eventually(lambda: running.output.count("ready in") == 2, within_s=60)
        yield running


def authorization(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[key]}"}


def post(server: ServerProcess, key: str, **fields: object) -> None:
    # A connection of its own, so that both front ends get some.
    answer = httpx.post(
        server.url + CHAT, json=ASK | fields, headers=authorization(key), timeout=60
    )
    assert answer.status_code in (200, 400)


def hang_up(server: ServerProcess, key: str) -> None:
    """After the first event; at least 20 tokens later, of which the client sees nothing."""
    with RawClient(server.port) as client:
        body = json.dumps(ASK | {"stream": True, "max_tokens": 900}).encode()
        head = f"Authorization: Bearer {KEYS[key]}"
        client.post(CHAT, body, "Content-Type: application/json", head)
        client.read_until(b'"content":')
        post(server, key)


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "requests.log").read_text().splitlines()]


def stored(folder: Path) -> list[Row]:
    database = sqlite_database(str(folder / "usage"))
    rows = database.read(*EVER, None)
    database.close()
    return sorted(rows, key=lambda row: (row.day, row.key))


def test_the_ledger_is_the_sum_of_the_log(server: ServerProcess, tmp_path: Path) -> None:
    for _ in range(10):
        for key in KEYS:
            post(server, key)
    post(server, "key-2", max_tokens=0)
    for _ in range(4):
        hang_up(server, "key-1")
    assert eventually(lambda: len(lines(tmp_path)) == 29)
    # Whichever front end is asked, it knows what the other has counted.
    assert eventually(lambda: stored(tmp_path) == sums(lines(tmp_path)))
    answer = httpx.get(server.url + "/v1/usage", headers=authorization("key-1")).json()
    assert answer["total"]["requests"] == 18
    other = httpx.get(server.url + "/v1/usage?key=*", headers=authorization("key-1"))
    assert other.status_code == 403

    assert server.stop() == 0
    assert stored(tmp_path) == sums(lines(tmp_path))
    abandoned = [line for line in lines(tmp_path) if line["outcome"] == "abandoned"]
    assert len(abandoned) == 4
    assert all(20 <= line["completion_tokens"] < 900 for line in abandoned), abandoned
    first, second = stored(tmp_path)
    assert (first.counters.requests, first.counters.aborted) == (20, 4)
    assert (second.counters.requests, second.counters.errors) == (11, 1)
    assert second.counters.completion_tokens == 300
