"""The engine stops, dies or is asked to go, for real: only the forward pass is simulated."""

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.live import RawClient, eventually
from tests.process import ROOT, ServerProcess, alive, server_process

CHAT = "/v1/chat/completions"
STALL_S = 2
DRAIN_S = 5
PREFILL_TPS = 1_000
END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
STREAMS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def server(llama3_folder: Path, folder: Path) -> Iterator[ServerProcess]:
    """Steps of a quarter of a second at most; of a prefill's steps the engine tells nothing, for
    it has no statistics to send."""
    with server_process(
        "--model", str(llama3_folder),
        "--distributed-executor-backend", "sim_executor.SimExecutor",
        "--max-num-batched-tokens", str(PREFILL_TPS // 4),
        "--disable-log-stats",
        "--stall-s", str(STALL_S),
        "--drain-s", str(DRAIN_S),
        "--log-file", str(folder / "requests.log"),
        output=folder / "output.txt",
        PYTHONPATH=str(ROOT / "scripts" / "benchmark" / "sim"),
        SIM_STEP_MS="20",
        SIM_PREFILL_TPS=str(PREFILL_TPS),
    ) as running:  # fmt: skip
        running.wait_until_ready()
        yield running


def ask(max_tokens: int, text: str = "x", **fields: object) -> dict:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, **fields}


def begun_stream(server: ServerProcess, max_tokens: int, *headers: str) -> RawClient:
    client = RawClient(server.port)
    body = json.dumps(ask(max_tokens, stream=True)).encode()
    client.post(CHAT, body, "Content-Type: application/json", *headers)
    client.read_until(b'"content":"The"')
    return client


def engine_of(server: ServerProcess) -> psutil.Process:
    (engine,) = [child for child in server.children() if "EngineCore" in child.name()]
    return engine


def readiness(server: ServerProcess) -> tuple[int, str]:
    answer = httpx.get(server.url + "/readyz")
    return answer.status_code, answer.json()["status"]


def test_a_long_prefill_is_no_stall(server: ServerProcess) -> None:
    """Three times as long as a stall, without a single token."""
    tokens = 3 * STALL_S * PREFILL_TPS
    seen: list[tuple[int, str]] = []

    async def probes() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            body = ask(1, "word " * tokens)
            chat = asyncio.create_task(client.post(CHAT, json=body))
            while not chat.done():
                await asyncio.sleep(0.1)
                answer = await client.get("/readyz")
                seen.append((answer.status_code, answer.json()["status"]))
            assert chat.result().json()["usage"]["prompt_tokens"] > tokens

    asyncio.run(probes())
    assert set(seen) == {(200, "ready")}
    assert len(seen) > 3 * STALL_S, "there was time to see a stall"


@pytest.mark.parametrize("busy", [True, False])
def test_a_stopped_engine_is_a_stall_until_it_goes_on(server: ServerProcess, busy: bool) -> None:
    engine = engine_of(server)
    stream = begun_stream(server, 100) if busy else None
    engine.suspend()
    try:
        assert eventually(lambda: readiness(server) == (503, "stalled"), within_s=30)
        refused = httpx.post(server.url + CHAT, json=ask(1))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stalled")
        assert httpx.get(server.url + "/livez").status_code == 200
    finally:
        engine.resume()
    assert eventually(lambda: readiness(server) == (200, "ready"), within_s=30)
    if stream is not None:
        received = stream.read_until(END)
        assert b'"finish_reason":"length"' in received
        assert received.count(b'"content":"') >= 50, "nothing that was said is lost"
        stream.hang_up()


def test_a_stopped_engine_keeps_nobody_beyond_their_time(
    server: ServerProcess, folder: Path
) -> None:
    """Neither one whose time is over nor one that leaves waits for the engine."""
    engine = engine_of(server)
    began = round(time.time(), 3)
    late = begun_stream(server, 8_000, "x-ochat-timeout-s: 2")
    leaves = begun_stream(server, 8_000)
    engine.suspend()
    try:
        received = late.read_until(END)
        leaves.hang_up()
        assert b'"code":"deadline_exceeded"' in received
        assert b'"finish_reason":"' not in received
        assert eventually(lambda: outcomes(folder, began) == ["abandoned", "timeout"])
    finally:
        engine.resume()
        late.hang_up()
    assert eventually(lambda: readiness(server) == (200, "ready"), within_s=30)


def outcomes(folder: Path, began: float) -> list[str]:
    lines = map(json.loads, (folder / "requests.log").read_text().splitlines())
    return sorted(line["outcome"] for line in lines if line["time"] >= began)


def test_ctrl_c_drains(server: ServerProcess, folder: Path) -> None:
    """A terminal sends it to the engine, too.  The last test here: nothing is left to serve."""
    children = server.children()
    began = round(time.time(), 3)
    body = RawClient(server.port)
    body.post(CHAT, json.dumps(ask(8_000)).encode())
    straggler = begun_stream(server, 8_000)
    streams = [begun_stream(server, 100) for _ in range(STREAMS)]
    for process in (*children, psutil.Process(server.process.pid)):
        process.send_signal(signal.SIGINT)
    assert eventually(lambda: readiness(server) == (503, "draining"))
    refused = httpx.post(server.url + CHAT, json=ask(1))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert refused.headers["connection"] == "close"
    assert httpx.get(server.url + "/livez").status_code == 200

    for stream in streams:
        received = stream.read_until(END)
        assert b'"finish_reason":"length"' in received
        stream.hang_up()
    assert b'"code":"shutting_down"' in straggler.read_until(END)
    assert body.read_until(b"}}").startswith(b"HTTP/1.1 503 ")
    straggler.hang_up()
    body.hang_up()

    assert server.process.wait(30) == 0
    assert eventually(lambda: not any(map(alive, children)), within_s=10)
    lines = [json.loads(line) for line in (folder / "requests.log").read_text().splitlines()]
    ends = sorted(
        (line["status"], line["outcome"], line.get("error", ""))
        for line in lines
        if line["time"] >= began
    )
    assert ends == [
        *[(200, "finished", "")] * STREAMS,
        (200, "shutdown", "shutting_down"),
        (503, "rejected", "draining"),
        (503, "shutdown", "shutting_down"),
    ]


def test_a_killed_server_leaves_no_engine(llama3_folder: Path, tmp_path: Path) -> None:
    """As by the out-of-memory killer: the next server needs the device, and nobody was told."""
    with server_process(
        "--model", str(llama3_folder),
        "--distributed-executor-backend", "sim_executor.SimExecutor",
        output=tmp_path / "output.txt",
        PYTHONPATH=str(ROOT / "scripts" / "benchmark" / "sim"),
        SIM_STEP_MS="20",
    ) as running:  # fmt: skip
        running.wait_until_ready()
        children = running.children()
        with begun_stream(running, 8_000):
            running.process.kill()
            try:
                assert eventually(lambda: not any(map(alive, children)), within_s=20)
            finally:
                for child in filter(alive, children):
                    child.kill()
