"""The ledger: counts in memory, and a thread that carries them to the database.

What the database does not take now (locked, full, down) stays in memory and is carried later.
"""

import logging
import threading
from typing import Protocol

from ochat_serve.generation import Usage
from ochat_serve.usage.counters import ANONYMOUS, Counters, Row, day_of, total
from ochat_serve.usage.database import Database, DatabaseError

# A killed process loses what it counted since, and what was on its way: less than a second.
FLUSH_INTERVAL_S = 0.5
# At the end a database in trouble is waited for so long: two transactions that are locked out.
CLOSE_TIMEOUT_S = 12.0
logger = logging.getLogger(__name__)
_NOTHING = Usage(0)
_NO_ERROR = ("finished", "abandoned")


class Finished(Protocol):
    """A request that has ended, as the request log knows it.  ``time`` is the Unix time of its
    arrival, in seconds; ``key`` the name of the key that was sent."""

    @property
    def time(self) -> float: ...
    @property
    def key(self) -> str | None: ...
    @property
    def usage(self) -> Usage | None: ...
    @property
    def outcome(self) -> str | None: ...


class UsageLedger:
    """Counters per key and day.  With ``anonymous``, requests without a key are ``ANONYMOUS``'s;
    else they are nobody's and not counted: they never came past the door."""

    def __init__(
        self,
        database: Database,
        *,
        anonymous: bool,
        flush_interval_s: float = FLUSH_INTERVAL_S,
        close_timeout_s: float = CLOSE_TIMEOUT_S,
    ) -> None:
        self._database = database
        self._anonymous = anonymous
        self._interval_s = flush_interval_s
        self._close_timeout_s = close_timeout_s
        self._pending: dict[tuple[str, str], Counters] = {}
        self._on_its_way: dict[tuple[str, str], Counters] = {}
        self._lock = threading.Lock()  # of ``_pending``; held for microseconds
        self._database_lock = threading.Lock()
        self._failing = False
        self._dirty = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage ledger", daemon=True)
        self._thread.start()

    def add(self, request: Finished) -> None:
        """Count one request; returns at once."""
        key = request.key or (ANONYMOUS if self._anonymous else None)
        if key is None:
            return
        used = request.usage or _NOTHING
        place = (key, day_of(request.time))
        with self._lock:
            counters = self._pending.get(place)
            if counters is None:
                counters = self._pending[place] = Counters()
                self._dirty.set()
            counters.requests += 1
            counters.prompt_tokens += used.prompt_tokens
            counters.completion_tokens += used.completion_tokens
            counters.cached_tokens += used.cached_tokens
            counters.errors += request.outcome not in _NO_ERROR
            counters.aborted += request.outcome == "abandoned"

    def read(self, first_day: str, last_day: str, key: str | None = None) -> list[Row]:
        """Accounts of the days from first to last, by day, then key; of one key or of all.

        Everything this process has counted is in them; other processes' counts up to
        ``FLUSH_INTERVAL_S`` ago.  Blocks; raises ``DatabaseError``.
        """
        with self._database_lock:
            stored = self._database.read(first_day, last_day, key)
            accounts = {(row.day, row.key): row.counters for row in stored}
            with self._lock:
                for (name, day), counters in self._pending.items():
                    if first_day <= day <= last_day and key in (None, name):
                        account = accounts.setdefault((day, name), Counters())
                        account += counters
        return [Row(name, day, account) for (day, name), account in sorted(accounts.items())]

    def total(self, key: str, first_day: str, last_day: str) -> Counters:
        """What one key has used on the days from first to last.  As ``read``."""
        return total(self.read(first_day, last_day, key))

    def close(self) -> None:
        """Carry the rest to the database and close it.  Blocks while the database does, up to
        ``close_timeout_s``."""
        self._closing.set()
        self._dirty.set()
        self._thread.join(self._close_timeout_s)
        hangs = self._thread.is_alive()
        left = [*self._pending.values(), *(self._on_its_way.values() if hangs else ())]
        lost = sum(counters.requests for counters in left)
        if lost:
            logger.error("The usage of %d requests was not written and is lost.", lost)
        if not hangs:  # else its thread has the connection, and ends with the process
            self._database.close()

    def _run(self) -> None:
        closing = False
        while not closing:  # once more after the last was added
            self._dirty.wait()
            closing = self._closing.wait(self._interval_s)
            self._dirty.clear()
            if not self._flush():
                self._dirty.set()

    def _flush(self) -> bool:
        """Whether nothing is left of what had been counted."""
        with self._database_lock:
            with self._lock:
                taken, self._pending = self._pending, {}
                self._on_its_way = taken
            # Sorted: two processes that lock rows in different orders would lock each other out.
            rows = [Row(key, day, counters) for (key, day), counters in sorted(taken.items())]
            try:
                self._database.add(rows)
            except DatabaseError as error:
                self._keep(taken)
                self._report(error)
                return False
            finally:
                self._on_its_way = {}
        self._report(None)
        return True

    def _keep(self, taken: dict[tuple[str, str], Counters]) -> None:
        with self._lock:
            for place, counters in taken.items():
                kept = self._pending.setdefault(place, Counters())
                kept += counters

    def _report(self, error: DatabaseError | None) -> None:
        """One line when trouble begins, one when it is over."""
        if error is not None and not self._failing:
            logger.error("Usage cannot be written, and is kept until it can: %s", error)
        elif error is None and self._failing:
            logger.warning("Usage is written again; nothing was lost.")
        self._failing = error is not None
