"""A real Redis, from the system's packages: a process of its own, which keeps nothing."""

import signal
import subprocess
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.live import eventually
from tests.process import free_port

START_TIMEOUT_S = 10


class RedisServer:
    """``redis-server`` on a free loopback port.  ``options`` are its own."""

    def __init__(self, folder: Path, *options: str, password: str | None = None) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.client = redis.Redis(
            host="127.0.0.1",
            port=self.port,
            password=password,
            socket_timeout=5,
            retry=Retry(NoBackoff(), 0),
        )
        self._folder = folder
        self._options = [*options, *(["--requirepass", password] if password else [])]

    def start(self) -> None:
        """Without anything that an earlier one knew."""
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--save", "", "--appendonly", "no", "--dir", str(self._folder)]
        with (self._folder / "redis.txt").open("ab") as output:
            self._process = subprocess.Popen([*command, *self._options], stdout=output)
        assert eventually(self._answers, START_TIMEOUT_S)

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.ConnectionError:
            return False

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """It hangs, until it may ``go_on``."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> "RedisServer":
        try:
            self.start()
        except AssertionError:
            self.kill()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.client.close()
        self.kill()
