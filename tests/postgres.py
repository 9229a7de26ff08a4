"""A real PostgreSQL server in a temporary folder.

PostgreSQL refuses to run as root: then it is started as the user that its package makes.
"""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

from tests.live import eventually
from tests.process import free_port

USER, PASSWORD, NAME = "ochat", "p@ss/w?rd#%: é", "postgres"
QUOTED = "p%40ss%2Fw%3Frd%23%25%3A%20%C3%A9"
START_TIMEOUT_S = 30


class PostgresServer:
    """``url`` is its address, with the password."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"postgresql://{USER}:{QUOTED}@127.0.0.1:{self.port}/{NAME}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._as_user: dict[str, Any] = {"cwd": folder}
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
            self._as_user |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._initialise()

    def _initialise(self) -> None:
        (self._folder / "password").write_text(PASSWORD)
        (self._folder / "password").chmod(0o644)
        subprocess.run(
            [
                program("initdb"), "--pgdata=data", f"--username={USER}", "--pwfile=password",
                "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync",
            ],
            check=True, capture_output=True, **self._as_user,
        )  # fmt: skip

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                program("postgres"), "-D", "data", "-p", str(self.port),
                "-c", "listen_addresses=127.0.0.1",
                "-c", f"unix_socket_directories={self._folder}",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **self._as_user,
        )  # fmt: skip
        assert eventually(self._accepts, START_TIMEOUT_S)

    def _accepts(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "it has ended"
        with contextlib.suppress(psycopg.OperationalError):
            self.execute("SELECT 1")
            return True
        return False

    def stop(self) -> None:
        """Now: connections are ended, what was committed stays."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(START_TIMEOUT_S)
            self._process = None

    def execute(self, sql: str) -> list[tuple[Any, ...]]:
        """The rows that a statement gives."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(sql)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else []


def program(name: str) -> str:
    """Debian keeps them out of the PATH, one folder per version."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parent.name)
    found = shutil.which(name, path=os.pathsep.join([*map(str, folders[::-1]), os.environ["PATH"]]))
    assert found is not None, f"PostgreSQL's {name} is needed: scripts/test installs it"
    return found


@contextlib.contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    # Not pytest's folder: nobody but its owner may enter that.
    folder = Path(tempfile.mkdtemp(prefix="ochat-postgres-"))
    folder.chmod(0o755)
    try:
        server = PostgresServer(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)
