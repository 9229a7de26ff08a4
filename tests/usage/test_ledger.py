"""The ledger on SQLite: what is counted, when it is written, and a database in trouble."""

import logging
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from ochat_serve.generation import Usage
from ochat_serve.usage.counters import ANONYMOUS, Counters, Row, total
from ochat_serve.usage.database import DatabaseError, sqlite_database
from ochat_serve.usage.ledger import FLUSH_INTERVAL_S, UsageLedger
from tests.live import eventually
from tests.usage.accounts import DAY, EVER, NEXT_DAY, NOON, of, request

AT_ONCE_S = 0.001
NEVER_S = 1_000


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An empty database."""
    file = tmp_path / "usage.sqlite"
    database = sqlite_database(str(file))
    database.check()
    database.close()
    return file


@contextmanager
def ledger_at(
    file: Path, flush_interval_s: float = NEVER_S, *, anonymous: bool = False
) -> Iterator[UsageLedger]:
    ledger = UsageLedger(
        sqlite_database(str(file), busy_timeout_s=0.01),
        anonymous=anonymous,
        flush_interval_s=flush_interval_s,
    )
    try:
        yield ledger
    finally:
        ledger.close()


def stored(file: Path) -> list[Row]:
    """What another process would find."""
    with closing(sqlite3.connect(file)) as connection:
        rows = connection.execute("SELECT * FROM ochat_usage ORDER BY day, key").fetchall()
    return [Row(key, day, Counters(*sums)) for key, day, *sums in rows]


def test_a_request_of_each_fate(file: Path):
    with ledger_at(file) as ledger:
        ledger.add(request())
        ledger.add(request(outcome="failed", usage=None))
        ledger.add(request(outcome="abandoned", usage=Usage(7, 1)))
        assert ledger.read(*EVER) == [Row("a", DAY, Counters(3, 10, 6, 2, errors=1, aborted=1))]


def test_accounts_are_per_key_and_day_of_arrival(file: Path):
    with ledger_at(file) as ledger:
        for key, time in (("b", NOON), ("a", NOON + 86_400), ("a", NOON), ("a", NOON)):
            ledger.add(request(key, time=time))
        assert ledger.read(*EVER) == [
            Row("a", DAY, of(2)),
            Row("b", DAY, of(1)),
            Row("a", NEXT_DAY, of(1)),
        ]


@pytest.mark.parametrize("carried", [False, True], ids=["in memory", "in the file"])
def test_days_and_keys_that_are_asked_for(file: Path, carried: bool):
    def add(ledger: UsageLedger) -> None:
        for key in "ab":
            ledger.add(request(key))
            ledger.add(request(key, time=NOON + 86_400))

    if carried:
        with ledger_at(file) as ledger:
            add(ledger)
    with ledger_at(file) as ledger:
        if not carried:
            add(ledger)
        assert [row.key for row in ledger.read(DAY, DAY)] == ["a", "b"]
        assert [row.day for row in ledger.read(*EVER, "b")] == [DAY, NEXT_DAY]
        assert ledger.read(NEXT_DAY, NEXT_DAY, "a") == [Row("a", NEXT_DAY, of(1))]
        assert ledger.read(NEXT_DAY, DAY) == []
        assert ledger.read(*EVER, "c") == []
        assert ledger.total("a", *EVER) == of(2)
        assert ledger.total("a", DAY, DAY) == of(1)
        assert ledger.total("c", *EVER) == Counters()


def test_no_key(file: Path):
    """Where keys are set, whoever came without one never came in."""
    with ledger_at(file) as ledger:
        ledger.add(request(None))
        assert ledger.read(*EVER) == []
    with ledger_at(file, anonymous=True) as ledger:
        ledger.add(request(None))
        assert ledger.read(*EVER) == [Row(ANONYMOUS, DAY, of(1))]


def test_close_writes_what_is_left(file: Path):
    with ledger_at(file) as ledger:
        for _ in range(1_000):
            ledger.add(request())
    assert stored(file) == [Row("a", DAY, of(1_000))]


def test_it_goes_on_where_the_last_one_ended(file: Path):
    for _ in range(2):
        with ledger_at(file) as ledger:
            ledger.add(request())
    assert stored(file) == [Row("a", DAY, of(2))]


def test_it_is_written_while_the_server_runs(file: Path):
    """Twice: a thread that wakes only once would do for the first."""
    with ledger_at(file, AT_ONCE_S) as ledger:
        for count in (1, 2):
            ledger.add(request())
            assert eventually(lambda n=count: stored(file) == [Row("a", DAY, of(n))])
        assert ledger.read(*EVER) == [Row("a", DAY, of(2))], "nothing counts twice"


def test_less_than_a_second_is_at_risk():
    assert FLUSH_INTERVAL_S <= 0.5


def test_only_the_owner_reads_it(tmp_path: Path):
    before = os.umask(0)
    try:
        with ledger_at(tmp_path / "new", AT_ONCE_S) as ledger:
            assert ledger.read(*EVER) == []
            ledger.add(request())
            assert eventually(lambda: stored(tmp_path / "new"))
            files = sorted(tmp_path.iterdir())
            assert len(files) == 3, "the database and its journal"
            assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    finally:
        os.umask(before)


def test_all_or_nothing(file: Path):
    database = sqlite_database(str(file))
    with pytest.raises(DatabaseError, match="NOT NULL"):
        database.add([Row("a", DAY, of(1)), Row(None, DAY, of(1))])
    database.close()
    assert stored(file) == []


def test_a_locked_file_loses_nothing(file: Path, caplog: pytest.LogCaptureFixture):
    with ledger_at(file, AT_ONCE_S) as ledger:
        ledger.add(request())
        assert eventually(lambda: stored(file))
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            ledger.add(request("b"))
            assert eventually(lambda: caplog.records)
            ledger.add(request("b"))
            # What is kept is seen all the while, and once.
            assert ledger.read(*EVER) == [Row("a", DAY, of(1)), Row("b", DAY, of(2))]
            other.execute("ROLLBACK")
        assert eventually(lambda: len(stored(file)) == 2)
        assert eventually(lambda: len(caplog.records) == 2)
    assert stored(file) == [Row("a", DAY, of(1)), Row("b", DAY, of(2))]
    begins, ends = caplog.records
    assert (begins.levelno, ends.levelno) == (logging.ERROR, logging.WARNING)
    assert "database is locked" in begins.getMessage()


def test_a_folder_that_goes_and_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = tmp_path / "there"
    with ledger_at(folder / "usage", AT_ONCE_S) as ledger:
        ledger.add(request())
        assert eventually(lambda: caplog.records)
        with pytest.raises(DatabaseError, match="No such file"):
            ledger.read(*EVER)
        folder.mkdir()
        assert eventually(lambda: len(caplog.records) == 2)
    assert stored(folder / "usage") == [Row("a", DAY, of(1))]


def keys_in_the_table(file: Path) -> list[str] | None:
    """None while there is no table."""
    try:
        return [row.key for row in stored(file)]
    except sqlite3.OperationalError:
        return None


@pytest.mark.parametrize("act", ["removed", "moved", "replaced"])
def test_a_file_that_is_taken_away_while_it_is_used(
    file: Path, caplog: pytest.LogCaptureFixture, act: str
):
    with ledger_at(file, AT_ONCE_S) as ledger, ledger_at(file) as other:
        other.read(*EVER)
        ledger.add(request())
        assert eventually(lambda: stored(file))
        if act == "removed":
            for path in file.parent.iterdir():
                path.unlink()
        else:
            file.rename(file.with_name("before"))
        if act == "replaced":
            new = sqlite_database(str(file))
            new.check()
            new.close()
        ledger.add(request("b"))
        assert eventually(lambda: file.exists() and keys_in_the_table(file) == ["b"])
        # Whoever comes later takes nothing from the new file, and both go on in it.
        journal = Path(f"{file}-wal")
        begun = journal.stat().st_ino
        assert other.read(*EVER) == [Row("b", DAY, of(1))]
        assert journal.stat().st_ino == begun
        for count in (2, 3):
            ledger.add(request("b"))
            assert eventually(lambda n=count: other.read(*EVER) == [Row("b", DAY, of(n))])
        other.add(request("c"))
    assert stored(file) == [Row("b", DAY, of(3)), Row("c", DAY, of(1))]
    told = [record.getMessage() for record in caplog.records]
    assert [said.split(" was ")[0] for said in told] == ["The usage database"] * 2, "once each"


def test_a_file_that_is_moved_while_another_process_uses_it(file: Path):
    """Its journal stays behind, and is not the new file's."""
    program = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1])\n"
        "c.execute('SELECT * FROM ochat_usage').fetchall(); print('reads', flush=True)\n"
        "sys.stdin.read()"
    )
    with ledger_at(file, AT_ONCE_S) as ledger:
        for _ in range(3):
            ledger.add(request())
        assert eventually(lambda: stored(file))
        with subprocess.Popen(
            [sys.executable, "-c", program, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"reads\n"
            journals = {path.name: path.stat().st_ino for path in file.parent.iterdir()}
            file.rename(file.with_name("before"))
            ledger.add(request("b"))
            assert eventually(lambda: file.exists() and keys_in_the_table(file) == ["b"])
            now = {path.name: path.stat().st_ino for path in file.parent.iterdir()}
            for journal in ("usage.sqlite-wal", "usage.sqlite-shm"):
                assert now[journal] != journals[journal]
            other.communicate()
    assert stored(file) == [Row("b", DAY, of(1))]


def test_what_is_lost_at_the_end_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with ledger_at(tmp_path / "none" / "usage") as ledger:
        ledger.add(request())
        ledger.add(request("b"))
    assert "usage of 2 requests" in caplog.records[-1].getMessage()


def test_a_database_that_hangs_does_not_keep_the_server_from_ending(
    file: Path, caplog: pytest.LogCaptureFixture
):
    writing, may_end = threading.Event(), threading.Event()

    def hang() -> None:
        writing.set()
        may_end.wait()

    ledger = UsageLedger(
        Interrupted(file, hang),
        anonymous=False,
        flush_interval_s=AT_ONCE_S,
        close_timeout_s=0.05,
    )
    ledger.add(request())
    assert writing.wait(5)
    ledger.add(request("b"))
    ledger.close()
    assert "usage of 2 requests" in caplog.records[-1].getMessage()
    may_end.set()
    assert eventually(lambda: not ledger._thread.is_alive())
    ledger.close()  # now that it can be


class Interrupted:
    """A database that, once, is busy writing when something else happens."""

    def __init__(self, file: Path, meanwhile: Callable[[], None]) -> None:
        self._database = sqlite_database(str(file))
        self._meanwhile = [meanwhile]
        self.read, self.close = self._database.read, self._database.close

    def add(self, rows: Sequence[Row]) -> None:
        if self._meanwhile:
            self._meanwhile.pop()()
        self._database.add(rows)


@pytest.mark.parametrize("key", ["a", "b"])
def test_a_request_that_ends_while_others_are_written(file: Path, key: str):
    """Neither is lost, neither counts twice."""
    database = Interrupted(file, lambda: ledger.add(request(key)))
    ledger = UsageLedger(database, anonymous=False, flush_interval_s=AT_ONCE_S)
    ledger.add(request())
    assert eventually(lambda: sum(row.counters.requests for row in stored(file)) == 2)
    ledger.close()
    assert total(stored(file)) == of(2)


def test_a_request_that_ends_while_others_are_not_written(file: Path):
    def meanwhile() -> None:
        ledger.add(request())
        raise DatabaseError("full")

    ledger = UsageLedger(Interrupted(file, meanwhile), anonymous=False, flush_interval_s=AT_ONCE_S)
    ledger.add(request())
    assert eventually(lambda: stored(file))
    ledger.close()
    assert stored(file) == [Row("a", DAY, of(2))]


def test_closing_while_others_are_written(file: Path):
    """What is added before the end is written, however late."""
    closing_at = threading.Thread(target=lambda: ledger.close())

    def meanwhile() -> None:
        ledger.add(request("b"))
        closing_at.start()

    ledger = UsageLedger(Interrupted(file, meanwhile), anonymous=False, flush_interval_s=AT_ONCE_S)
    ledger.add(request())
    assert eventually(lambda: closing_at.ident is not None)
    closing_at.join()
    assert total(stored(file)) == of(2)
