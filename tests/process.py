"""The server as a user starts it: a process of its own."""

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parent.parent
READY_TIMEOUT_S = 240
STOP_TIMEOUT_S = 60


class ServerProcess:
    """``python -m ochat_serve.openai_api_server`` with arguments, on a free port.  ``trusted``
    is for asking a server that speaks HTTPS."""

    def __init__(
        self,
        *arguments: str,
        output: Path,
        trusted: ssl.SSLContext | None = None,
        module: str = "ochat_serve.openai_api_server",
        **environ: str,
    ) -> None:
        self.port = free_port()
        self.url = f"http{'s' if trusted else ''}://127.0.0.1:{self.port}"
        self._trusted = trusted
        self._output = output
        command = [sys.executable, "-m", module]
        command += [*arguments, "--port", str(self.port)]
        with output.open("wb") as stream:
            self.process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", **environ},
            )

    def wait_until_answering(self, timeout_s: float = 30) -> None:
        """The port answers, whatever it says."""
        self._poll("/livez", timeout_s)

    def wait_until_ready(self, key: str = "") -> None:
        self._poll("/readyz", READY_TIMEOUT_S, {"authorization": f"Bearer {key}"} if key else {})

    def _poll(self, path: str, timeout_s: float, headers: dict[str, str] | None = None) -> None:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                verify = self._trusted or True
                if httpx.get(self.url + path, headers=headers, verify=verify).status_code == 200:
                    return
            assert self.process.poll() is None, self.output[-4000:]
            time.sleep(0.1)
        raise AssertionError(f"{path} did not answer in {timeout_s} s: {self.output[-4000:]}")

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, sig: signal.Signals = signal.SIGTERM) -> int:
        """The exit code after a signal."""
        self.process.send_signal(sig)
        return self.process.wait(STOP_TIMEOUT_S)

    def end(self) -> None:
        """Leave nothing behind, however the test went."""
        if self.process.poll() is None:
            for child in self.children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def server_process(
    *arguments: str, output: Path, trusted: ssl.SSLContext | None = None, **environ: str
) -> Iterator[ServerProcess]:
    server = ServerProcess(*arguments, output=output, trusted=trusted, **environ)
    try:
        yield server
    finally:
        server.end()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
