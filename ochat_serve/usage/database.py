"""The ledger's table, in SQLite or PostgreSQL: one dialect, two ways to connect.

Several processes may have one database open; every row is added to where it lies.
"""

import fcntl
import logging
import math
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from ochat_serve.usage.counters import COUNTERS, Counters, Row

logger = logging.getLogger(__name__)
TABLE = "ochat_usage"
CREATE = f"""
    CREATE TABLE IF NOT EXISTS {TABLE} (
        key TEXT NOT NULL,
        day TEXT NOT NULL,
        {" ".join(f"{name} BIGINT NOT NULL," for name in COUNTERS)}
        PRIMARY KEY (key, day)
    )"""
_ADD = f"""
    INSERT INTO {TABLE} (key, day, {", ".join(COUNTERS)})
    VALUES ({", ".join("?" * (2 + len(COUNTERS)))})
    ON CONFLICT (key, day) DO UPDATE SET
    {", ".join(f"{name} = {TABLE}.{name} + excluded.{name}" for name in COUNTERS)}"""
_READ = f"SELECT key, day, {', '.join(COUNTERS)} FROM {TABLE} WHERE day >= ? AND day <= ?"
_CHECK = f"UPDATE {TABLE} SET requests = requests WHERE 1 = 0"
# How long another process's transaction is waited for; they take milliseconds.
BUSY_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_S = 5.0
_FILE_MODE = 0o600
MOVED = (
    "The usage database was removed or replaced while it was in use. What it held is where it "
    "was moved to, or lost; from now on usage is kept in what is there now."
)
_CREATE_LOCK = 0x6F636861745F75  # "ochat_u": any number that nobody else locks


class DatabaseError(Exception):
    """The database does not do what it should.  The text is one line."""


class Connection(Protocol):
    """What Python's database interface has in common."""

    def cursor(self) -> Any: ...
    def commit(self) -> None: ...
    def close(self) -> None: ...


class Database:
    """Connects when it is first needed, and again after an error.  One thread at a time.

    ``connect`` gives a connection on which the table exists; ``mark`` is how its statements
    name a value; ``failures`` is what it raises; ``first`` is done first in each transaction;
    ``is_there`` tells whether what is connected is still where ``connect`` would find it.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        mark: str,
        failures: tuple[type[Exception], ...],
        first: str | None = None,
        is_there: Callable[[], bool] = lambda: True,
    ) -> None:
        self._connect = connect
        self._mark = mark
        self._failures = failures
        self._first = first
        self._is_there = is_there
        self._connection: Connection | None = None

    def check(self) -> None:
        """Find out now what would keep it from being written.  Raises ``DatabaseError``."""
        with self._transaction() as cursor:
            cursor.execute(_CHECK)

    def add(self, rows: Sequence[Row]) -> None:
        """Add to the accounts in one transaction: all or nothing.  Raises ``DatabaseError``."""
        if not rows:
            return
        values = [(row.key, row.day, *row.counters.values()) for row in rows]
        with self._transaction() as cursor:
            cursor.executemany(self._sql(_ADD), values)

    def read(self, first_day: str, last_day: str, key: str | None) -> list[Row]:
        """In no order.  Raises ``DatabaseError``."""
        sql, values = _READ, [first_day, last_day]
        if key is not None:
            sql, values = f"{sql} AND key = ?", [*values, key]
        with self._transaction() as cursor:
            cursor.execute(self._sql(sql), values)
            return [Row(name, day, Counters(*sums)) for name, day, *sums in cursor.fetchall()]

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(*self._failures):
                connection.close()

    def _sql(self, text: str) -> str:
        return text.replace("?", self._mark)

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        try:
            if self._connection is not None and not self._is_there():
                self.close()  # SQLite leaves alone what is in its place by now
                logger.error(MOVED)
            if self._connection is None:
                self._connection = self._connect()
            cursor = self._connection.cursor()
            if self._first is not None:
                cursor.execute(self._first)
            yield cursor
            self._connection.commit()
        except self._failures as error:
            self.close()  # and with it the transaction
            text = getattr(error, "strerror", None) or str(error)
            raise DatabaseError(" ".join(text.split())) from error


def sqlite_database(path: str, *, busy_timeout_s: float = BUSY_TIMEOUT_S) -> Database:
    """A file, which is made if there is none, in a folder that exists."""

    opened: tuple[int, int] | None = None

    def connect() -> Connection:
        nonlocal opened
        _make(path)
        opened = _file_at(path)
        connection = sqlite3.connect(
            path, timeout=busy_timeout_s, isolation_level="IMMEDIATE", check_same_thread=False
        )
        try:
            # Readers and the writer do not wait for each other; one sync per transaction, so
            # that what was written outlives a power cut, too.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(CREATE)
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    # Absolute, so that no name (":memory:") means something else to SQLite.
    path = os.path.abspath(path)
    return Database(
        connect, "?", (sqlite3.Error, OSError), is_there=lambda: _file_at(path) == opened
    )


def _make(path: str) -> None:
    """A file where none is: here and not by SQLite, so that only its owner can read it."""
    with _one_at_a_time(os.path.dirname(path)):
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, _FILE_MODE))
        except FileExistsError:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, _FILE_MODE))
            return
        for journal in ("-wal", "-shm"):  # of one that was removed, and that others may still use
            with suppress(FileNotFoundError):
                os.unlink(path + journal)


@contextmanager
def _one_at_a_time(folder: str) -> Iterator[None]:
    """Of all processes: or one would take away the journal that another has just begun."""
    locked = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(locked, fcntl.LOCK_EX)
        yield
    finally:
        os.close(locked)


def _file_at(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def postgres_database(url: str, *, statement_timeout_s: float = STATEMENT_TIMEOUT_S) -> Database:
    """By a libpq address.  Raises ``DatabaseError`` if it is none, ``ImportError`` where psycopg 3
    is not installed."""
    import psycopg

    # For a server that has gone silent; what the address says wins.
    patience: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "tcp_user_timeout": 2_000 * CONNECT_TIMEOUT_S,  # milliseconds
        "application_name": "ochat_serve",
    }
    options = patience | _parsed(url)
    # In each transaction, not in the address: poolers refuse it there, and mix up sessions.
    first = f"SET LOCAL statement_timeout = {math.ceil(1_000 * statement_timeout_s)}"

    def connect() -> Connection:
        # No prepared statements: poolers such as PgBouncer lose them.
        connection = psycopg.connect(**options, prepare_threshold=None)
        try:
            _create_once(connection, first)
        except psycopg.Error:
            connection.close()
            raise
        return connection

    return Database(connect, "%s", (psycopg.Error, OSError), first)


def _parsed(url: str) -> dict[str, Any]:
    """The parts of an address.  Libpq's complaints are dropped: they quote it, password and all."""
    from psycopg import ProgrammingError
    from psycopg.conninfo import conninfo_to_dict

    with suppress(ProgrammingError):
        return dict(conninfo_to_dict(url))
    raise DatabaseError("it is not an address that libpq understands")


def _create_once(connection: Any, first: str) -> None:
    """Two that create a table at once get in each other's way, even IF NOT EXISTS; and whoever
    may not create one can still use one that is there."""
    with connection.transaction(), connection.cursor() as cursor:
        cursor.execute(first)
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", (_CREATE_LOCK,))
        cursor.execute("SELECT to_regclass(%s)", (TABLE,))
        if cursor.fetchone() == (None,):
            cursor.execute(CREATE)
