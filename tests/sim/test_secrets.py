"""No key and no password is shown, whatever fails: databases are lost, then the engine dies."""

from pathlib import Path

import httpx
import psutil
import pytest

from ochat_serve import keys
from tests.live import eventually
from tests.postgres import PASSWORD, QUOTED, postgres_server
from tests.process import ROOT, ServerProcess, server_process
from tests.redis_server import RedisServer
from tests.test_start import planted, titles

CHAT = "/v1/chat/completions"
REDIS_PASSWORD = "sekret-of-redis"
BOSS = "sk-KEY-BOSS"
STEPS = 50
ASK = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}


def status(server: ServerProcess, key: str, **fields: object) -> int:
    headers = {"authorization": f"Bearer {key}"}
    body = {**ASK, **fields}
    return httpx.post(server.url + CHAT, json=body, headers=headers, timeout=60).status_code


def test_no_secret_is_shown_not_even_by_a_crash(
    llama3_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, log = str(tmp_path / "keys.json"), tmp_path / "requests.log"
    assert keys.main(["--key-file", file, "add", "alice", "--requests-per-minute", "100"]) == 0
    alice = capsys.readouterr().out.strip()
    with (
        RedisServer(tmp_path, password=REDIS_PASSWORD) as redis,
        postgres_server() as postgres,
        server_process(
            "--model", str(llama3_folder),
            "--distributed-executor-backend", "sim_executor.SimExecutor",
            "--key-file", file,
            "--redis-url", f"{redis.url}/0?password={REDIS_PASSWORD}",
            "--log-file", str(log), "--log-content",
            output=tmp_path / "output.txt",
            PYTHONPATH=str(ROOT / "scripts" / "benchmark" / "sim"),
            SIM_STEP_MS="5", SIM_CRASH_AFTER=str(STEPS),
            OCHAT_ADMIN_KEYS=BOSS,
            OCHAT_USAGE_DB=postgres.url,
        ) as server,
    ):  # fmt: skip
        server.wait_until_ready(alice)
        assert status(server, alice) == 200
        seen = [*planted(server, alice), *titles(server)]
        redis.kill()
        postgres.stop()
        assert status(server, alice) == 503
        assert status(server, BOSS) == 200
        assert eventually(lambda: "Limits cannot be kept" in server.output)
        assert eventually(lambda: "Usage cannot be written" in server.output, within_s=30)
        seen += titles(server)
        (engine,) = [child for child in server.children() if "EngineCore" in child.name()]
        assert status(server, BOSS, max_tokens=10 * STEPS) == 503
        assert server.process.wait(30) == 1
        assert not psutil.pid_exists(engine.pid)
    assert "Traceback" in server.output
    for text in (server.output, log.read_text(), *seen):
        for secret in (alice, REDIS_PASSWORD, PASSWORD, QUOTED, BOSS):
            assert secret not in text
