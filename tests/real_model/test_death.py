"""A worker of vLLM's outlives the engine process that was killed: it must not keep the device."""

import json
from pathlib import Path

from tests.live import RawClient, eventually
from tests.process import alive, server_process

CHAT = "/v1/chat/completions"
ASK = {
    "messages": [{"role": "user", "content": "Tell me a long story."}],
    "max_tokens": 900,
    "ignore_eos": True,
    "stream": True,
}


def test_a_hung_worker_of_a_killed_engine_is_ended_too(tmp_path: Path) -> None:
    with server_process(
        "--model", "demo",
        "--max-model-len", "1024",
        "--distributed-executor-backend", "mp",
        output=tmp_path / "output.txt",
        VLLM_CPU_KVCACHE_SPACE="1",
    ) as server:  # fmt: skip
        server.wait_until_ready()
        children = server.children()
        (engine,) = [child for child in children if "EngineCore" in child.name()]
        (worker,) = [child for child in children if "Worker" in child.name()]
        try:
            with RawClient(server.port) as stream:
                stream.post(CHAT, json.dumps(ASK).encode())
                stream.read_until(b'"role":"assistant"')
                worker.suspend()  # it cannot see that its engine is gone
                engine.kill()
                assert b'"code":"engine_dead"' in stream.read_until(b"data: [DONE]")
            assert server.process.wait(20) == 1
            assert eventually(lambda: not any(map(alive, children)), within_s=10)
        finally:
            if alive(worker):
                worker.kill()
