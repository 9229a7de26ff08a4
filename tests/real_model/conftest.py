"""The demo model on a real vLLM engine, started once for all tests of this folder."""

import json
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ochat_serve import cli, loader
from ochat_serve.app import create_app
from ochat_serve.chat_service import ChatService
from ochat_serve.server import open_log
from ochat_serve.serving import Serving
from tests.live import LiveServer, eventually, live


@dataclass
class Demo:
    """The running server, with a view into its engine and its log."""

    server: LiveServer
    serving: Serving
    log_file: Path

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def engine(self) -> object:
        return self.serving.chat.served.engine

    def unfinished(self) -> int:
        """Requests that vLLM still works on, by its own count."""
        return self.engine._llm.get_num_unfinished_requests()

    def holds_no_blocks(self) -> bool:
        """Whether the engine process itself has freed every KV block: it refuses to reset its
        prefix cache while a request, running or aborted too late, holds one."""
        return self.server.call(self.engine._llm.reset_prefix_cache())

    def log_line(self, request_id: str) -> dict[str, object]:
        """Of one request, when it is written."""

        def found() -> list[dict[str, object]]:
            lines = map(json.loads, self.log_file.read_text().splitlines())
            return [line for line in lines if line["request_id"] == request_id]

        assert eventually(found)
        (line,) = found()
        return line


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    log_file = tmp_path_factory.mktemp("log") / "requests.log"
    command = cli.parse(["--model", "demo", "--log-file", str(log_file), "--max-model-len", "2048"])
    log = open_log(command.settings)
    serving = Serving()
    with live(create_app(command.settings, serving, log)) as running:
        with warnings.catch_warnings(action="ignore"):  # torch and vLLM warn while they import
            served = loader.load(command, lambda phase: None)
        serving.chat = ChatService(
            served,
            command.settings,
            clock=time.monotonic,
            now=time.time,
            limits=serving.limits,
            cache_secret=loader.new_cache_secret(),
        )
        yield Demo(running, serving, log_file)
    log.close()
