"""The servers under test, started as a user starts them and stopped by their own pid."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ochat_serve.caller import KeyLimits, digest_of
from ochat_serve.key_file import Entry, KeyFile, Secret
from scripts.benchmark.cases import SHORT_TOKENS
from scripts.benchmark.load import KEY, body, drive

START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 60
POLL_S = 0.05
# A connection made while the server was binding may never be answered.
ANSWER_TIMEOUT_S = 3.0
MODEL = "bench"


@dataclass(frozen=True)
class Contender:
    """A server to start: ``name`` in the tables, ``module`` to run, its own flags.  ``guarded``:
    with everything on that protects a public server."""

    name: str
    module: str
    flags: tuple[str, ...] = ()
    guarded: bool = False

    def all_flags(self, scratch: Path) -> list[str]:
        return [*self.flags, *(_guards(scratch) if self.guarded else ())]


VLLM = Contender("vllm", "vllm.entrypoints.openai.api_server")
OURS_PERIOD_1 = Contender(
    "ours, period 1", "ochat_serve.openai_api_server", ("--stream-period", "1")
)
OURS_AUTO = Contender("ours, auto", "ochat_serve.openai_api_server")
OURS_GUARDED = Contender(
    "ours, guarded", "ochat_serve.openai_api_server", ("--stream-period", "1"), guarded=True
)


def _guards(scratch: Path) -> list[str]:
    """A key with limits that are never reached, the log, the ledger."""
    key_file = KeyFile(str(scratch / "keys.json"))
    limits = dict.fromkeys(KeyLimits.__slots__, 10**12)
    secret = Secret(sha256=digest_of(KEY.encode()).hex(), created="2026-01-01T00:00:00Z")
    with key_file.edited() as content:
        content.keys["bench"] = Entry(secrets=[secret], **limits)
    places = {
        "--key-file": key_file.path,
        "--log-file": scratch / "requests.log",
        "--usage-db": scratch / "usage.sqlite",
    }
    return [str(word) for pair in places.items() for word in pair]


@dataclass(frozen=True)
class Cpu:
    """CPU seconds spent so far: by the front end's processes, and by the engine's."""

    front_s: float
    engine_s: float

    def __sub__(self, other: "Cpu") -> "Cpu":
        return Cpu(self.front_s - other.front_s, self.engine_s - other.engine_s)


@dataclass
class Running:
    """A started server.  ``start_s`` is the time from its start to its first answer."""

    port: int
    process: psutil.Process
    start_s: float = 0.0
    environ: Mapping[str, str] = field(default_factory=dict)

    def _parts(self) -> tuple[list[psutil.Process], list[psutil.Process]]:
        front, engine = [self.process], []
        for child in self.process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                name = " ".join((child.name(), *child.cmdline()))
                (front if "ApiServer" in name else engine).append(child)
        return front, engine

    def cpu(self) -> Cpu:
        front, engine = self._parts()
        return Cpu(sum(map(_cpu_s, front)), sum(map(_cpu_s, engine)))

    def front_rss_mib(self) -> float:
        return sum(process.memory_info().rss for process in self._parts()[0]) / 2**20


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system


@contextlib.asynccontextmanager
async def running(
    contender: Contender,
    flags: Sequence[str],
    environ: Mapping[str, str],
    output: Path,
    scratch: Path,
) -> AsyncIterator[Running]:
    """Start ``contender`` and wait for its first answer; stop it at the end."""
    port = _free_port()
    command = [sys.executable, "-m", contender.module, *contender.all_flags(scratch), *flags]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL]
    started = time.perf_counter()
    with output.open("wb") as stream:
        process = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs yet
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environ},
        )
    server = Running(port, psutil.Process(process.pid))
    try:
        await _first_answer(port, process, output)
        server.start_s = time.perf_counter() - started
        yield server
    finally:
        await asyncio.to_thread(_stop, process)


async def _first_answer(port: int, process: subprocess.Popen[bytes], output: Path) -> None:
    request = body([{"role": "user", "content": "Hello"}], SHORT_TOKENS, MODEL)
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError, RuntimeError):
            await drive(port, [[request]], ANSWER_TIMEOUT_S)
            return
        if process.poll() is not None:
            break
        await asyncio.sleep(POLL_S)
    raise SystemExit(
        f"bench: the server did not start: {output.read_text(errors='replace')[-3000:]}"
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    children = (
        psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    )
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in psutil.wait_procs(children, timeout=10)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _free_port() -> int:
    """Below the ports that clients get: one of those can connect to itself."""
    for port in range(18_900, 20_000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise SystemExit("bench: no free port between 18900 and 20000")
