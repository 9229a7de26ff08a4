"""A ledger on a disk that fills up, as a process of its own: ``python -m tests.usage.full_disk
FILE``.

The limit on the size of files is the whole process's; SQLite finds it like a full disk.
"""

import logging
import resource
import sys

from ochat_serve.usage.counters import Row
from ochat_serve.usage.database import sqlite_database
from ochat_serve.usage.ledger import UsageLedger
from tests.live import eventually
from tests.usage.accounts import DAY, EVER, of, request


def main(file: str) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)

    database = sqlite_database(file)
    database.check()
    ledger = UsageLedger(database, anonymous=False, flush_interval_s=0.001)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    ledger.add(request())
    assert eventually(lambda: said), "it is noticed"
    ledger.add(request())
    assert not eventually(lambda: len(said) > 1, within_s=0.1), "and said once"
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert eventually(lambda: len(said) > 1), "it is over"
    assert ledger.read(*EVER) == [Row("a", DAY, of(2))]
    ledger.close()
    assert len(said) == 2, said
    print(said[0])


if __name__ == "__main__":
    main(sys.argv[1])
