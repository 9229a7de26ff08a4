"""A server with everything on, to be treated badly: keys with limits, the request log, the usage
database, bounds of seconds.  The engine is real but for its forward pass."""

import contextlib
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

from ochat_serve.caller import digest_of
from ochat_serve.key_file import Entry, KeyFile, Secret
from ochat_serve.usage.counters import Row
from ochat_serve.usage.database import sqlite_database
from tests.live import eventually
from tests.process import ROOT, ServerProcess, server_process
from tests.request_log.disks import LimitedDisk, TmpfsDisk
from tests.usage.accounts import EVER, sums

CHAT = "/v1/chat/completions"
PLACES = 64
STEP_TOKENS = 256
STEP_MS = 20
MAX_MODEL_LEN = 1024
MAX_BODY_MB = 0.25
READ_TIMEOUT_S = 2
WRITE_TIMEOUT_S = 2
# The answer to a client that asks for this name is large, so whoever does not read is soon full.
LONG_NAME = "m" * 1_000

# Limits that are kept but not reached.
_AMPLE = {
    "requests_per_minute": 10**6,
    "tokens_per_minute": 10**9,
    "parallel_requests": 10**4,
    "tokens_per_day": 10**9,
}
# The name of a key -> what it may
KEYS: dict[str, dict[str, object]] = {
    "ops": {"role": "admin"},
    "anna": _AMPLE,
    "ben": _AMPLE,
    "few-requests": {"requests_per_minute": 20},
    "one-at-a-time": {"parallel_requests": 1},
    "few-tokens": {"tokens_per_minute": 500},
    "small-quota": {"tokens_per_day": 500},
    "flood": _AMPLE,
    "guest": _AMPLE,
    "lost": _AMPLE,  # whose lines a full disk may have lost
}


def secret(name: str) -> str:
    return f"sk-{name}-0123456789"


def authorization(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret(name)}"}


class Guarded:
    """``disk`` holds the log and the ledger."""

    def __init__(self, server: ServerProcess, disk: TmpfsDisk | LimitedDisk) -> None:
        self.server = server
        self.port = server.port
        self.disk = disk
        self.log = disk.folder / "requests.log"

    def ask(self, key: str, **fields: object) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **fields}
        url = self.server.url + CHAT
        return httpx.post(url, json=body, headers=authorization(key), timeout=60)

    def get(self, path: str, key: str = "ops") -> httpx.Response:
        return httpx.get(self.server.url + path, headers=authorization(key), timeout=60)

    def in_engine(self) -> tuple[int, int]:
        """By vLLM's own gauges: how many run there and how many wait."""
        text = self.get("/metrics").text
        gauges = dict(re.findall(r"vllm:num_requests_(running|waiting){.*} (\S+)", text))
        return int(float(gauges["running"])), int(float(gauges["waiting"]))

    def is_at_rest(self, within_s: float = 10) -> bool:
        """Whether nothing is left in the engine or on any connection."""
        return eventually(lambda: self.in_engine() == (0, 0) and not self.connections(), within_s)

    def connections(self) -> int:
        of_server = psutil.Process(self.server.process.pid).net_connections("tcp")
        return sum(
            connection.status != psutil.CONN_LISTEN and connection.laddr.port == self.port
            for connection in of_server
        )

    def has_all_places(self) -> bool:
        """Whether a request gets in that needs every place, and a prefill without others."""
        prompt = [{"role": "user", "content": "word " * (2 * STEP_TOKENS)}]
        answer = self.ask("anna", n=PLACES, messages=prompt, max_tokens=1, temperature=1)
        return answer.status_code == 200 and len(answer.json()["choices"]) == PLACES

    def lines(self) -> list[dict[str, Any]]:
        """Of the log so far; what is just being written is not looked at."""
        *whole, _ = self.log.read_text().split("\n")
        return [json.loads(line) for line in whole]

    def stored(self) -> list[Row]:
        """The accounts in the database."""
        database = sqlite_database(str(self.disk.folder / "usage"))
        try:
            return _in_order(database.read(*EVER, None))
        finally:
            database.close()

    def accounts_are_the_logs_sums(self) -> bool:
        return _in_order(sums(self.lines())) == self.stored()


def _in_order(rows: list[Row]) -> list[Row]:
    kept = [row for row in rows if row.key != "lost"]
    return sorted(kept, key=lambda row: (row.day, row.key))


def _write_keys(path: Path) -> None:
    now = datetime.now(UTC)
    with KeyFile(str(path)).edited() as content:
        for name, may in KEYS.items():
            digest = digest_of(secret(name).encode()).hex()
            content.keys[name] = Entry(**may, secrets=[Secret(sha256=digest, created=now)])


@contextlib.contextmanager
def guarded_server(model: Path, folder: Path, disk: TmpfsDisk | LimitedDisk) -> Iterator[Guarded]:
    """Ready, and every key has been used: wrong ones slow down only who is not known."""
    _write_keys(folder / "keys.json")
    with server_process(
        "--model", str(model),
        "--served-model-name", "guarded", LONG_NAME,
        "--key-file", str(folder / "keys.json"),
        "--log-file", str(disk.folder / "requests.log"),
        "--usage-db", str(disk.folder / "usage"),
        "--max-n", str(PLACES),
        "--max-num-seqs", str(PLACES),
        "--max-model-len", str(MAX_MODEL_LEN),
        "--max-num-batched-tokens", str(STEP_TOKENS),
        "--max-body-mb", str(MAX_BODY_MB),
        "--read-timeout-s", str(READ_TIMEOUT_S),
        "--write-timeout-s", str(WRITE_TIMEOUT_S),
        "--distributed-executor-backend", "sim_executor.SimExecutor",
        output=folder / "output.txt",
        PYTHONPATH=str(ROOT / "scripts" / "benchmark" / "sim"),
        SIM_STEP_MS=str(STEP_MS),
    ) as server:  # fmt: skip
        server.wait_until_ready(secret("ops"))
        guarded = Guarded(server, disk)
        for name in KEYS:
            assert guarded.get("/v1/models", name).status_code == 200
        assert eventually(lambda: len(guarded.lines()) == len(KEYS))
        yield guarded
