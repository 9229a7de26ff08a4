"""The disk with the log and the ledger is full for a while: nobody who asks finds out."""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import date
from pathlib import Path

from ochat_serve.usage.counters import Counters, Row, total
from ochat_serve.usage.database import sqlite_database
from tests.live import eventually
from tests.request_log.disks import LimitedDisk, TmpfsDisk
from tests.sim.abuse.guarded import Guarded

# Where no disk can be mounted, no file of the server's may be larger than this.  Its output is
# smaller, the log and the journal of the database are made larger.
ROOM = 64 * 1024
# A line of the log with it has more bytes than a page that may be free on a full disk.
LARGE = {f"note {number}": "x" * 512 for number in range(16)}


def disk_of(guarded: Guarded) -> TmpfsDisk | LimitedDisk:
    if isinstance(guarded.disk, TmpfsDisk):
        return guarded.disk
    return LimitedDisk(guarded.disk.folder, guarded.server.process.pid)


@contextmanager
def large_journal(path: Path) -> Iterator[None]:
    """Of the database, and it stays: somebody reads."""
    database = sqlite_database(str(path))
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM ochat_usage").fetchall()
        days = [date.fromordinal(500_000 + number).isoformat() for number in range(1_500)]
        database.add([Row("lost", day, Counters()) for day in days])
        database.close()
        yield


def asked(guarded: Guarded, count: int) -> int:
    for number in range(count):
        answer = guarded.ask("lost", metadata=LARGE, stream=number % 2 == 0)
        assert answer.status_code == 200
        assert "The" in answer.text
    return count


def test_a_full_disk_fails_no_request(guarded: Guarded) -> None:
    def lines() -> int:
        return sum(line.get("key") == "lost" for line in guarded.lines())

    def says(what: str) -> bool:
        return eventually(lambda: what in guarded.server.output)

    disk = disk_of(guarded)
    before = lines()
    with large_journal(disk.folder / "usage"):
        sent = asked(guarded, 10)
        assert eventually(lambda: lines() == before + sent)
        assert all(
            (disk.folder / name).stat().st_size > ROOM for name in ("requests.log", "usage-wal")
        )
        disk.fill(ROOM)
        try:
            sent += asked(guarded, 10)
            assert says("Lines of the request log are lost: ")
            assert says("Usage cannot be written, and is kept until it can: ")
            sent += asked(guarded, 5)
        finally:
            disk.free()
        sent += asked(guarded, 1)
        assert says("The request log is written again; ")
        assert says("Usage is written again; nothing was lost.")

    # What was dropped is counted, the ledger has all of it.
    found = re.search(r"written again; (\d+) lines are lost", guarded.server.output)
    assert found is not None
    lost = int(found[1])
    assert 5 < lost < sent
    assert eventually(lambda: lines() == before + sent - lost)
    assert eventually(lambda: used(disk.folder / "usage").requests == before + sent)
    assert used(disk.folder / "usage").completion_tokens == 2 * sent


def used(path: Path) -> Counters:
    database = sqlite_database(str(path))
    try:
        return total(database.read("2000-01-01", "9999-12-31", "lost"))
    finally:
        database.close()
