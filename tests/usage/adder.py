"""A server's part of a ledger, as a process of its own: ``python -m tests.usage.adder DATABASE
COUNT PAUSE_S``.

Adds a request of ``a`` and one of ``b``, COUNT times, and says each time which it was and when.
"""

import sys
import time

from ochat_serve.setting_values import POSTGRES_SCHEMES
from ochat_serve.usage.database import postgres_database, sqlite_database
from ochat_serve.usage.ledger import UsageLedger
from tests.usage.accounts import request

# A tenth of the real one: what is lost is far from a second even on a machine that is busy.
FLUSH_INTERVAL_S = 0.05


def main(place: str, count: int, pause_s: float) -> None:
    is_address = place.startswith(POSTGRES_SCHEMES)
    database = postgres_database(place) if is_address else sqlite_database(place)
    ledger = UsageLedger(database, anonymous=False, flush_interval_s=FLUSH_INTERVAL_S)
    for number in range(1, count + 1):
        ledger.add(request("a"))
        ledger.add(request("b"))
        print(number, time.monotonic(), flush=True)
        time.sleep(pause_s)
    ledger.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
