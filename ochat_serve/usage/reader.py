"""Reading the ledger from an event loop: one question at a time, each for so long at most.

A database that hangs takes one thread that nobody else needs and nobody waits for at the end;
those that ask are told in time.
"""

import asyncio
import threading
from contextlib import suppress

from ochat_serve.usage.counters import Counters, Row, total
from ochat_serve.usage.database import DatabaseError
from ochat_serve.usage.ledger import UsageLedger

# A client waits this long before it is told; it is as long as a locked database is waited for.
READ_TIMEOUT_S = 5.0
_Question = tuple[str, str, str | None]


class LedgerReader:
    """For one event loop.  Methods as those of the ledger; ``DatabaseError``, too, when there is
    no answer within ``timeout_s``."""

    def __init__(self, ledger: UsageLedger, timeout_s: float = READ_TIMEOUT_S) -> None:
        self._ledger = ledger
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()
        self._totals: dict[_Question, asyncio.Task[list[Row]]] = {}

    async def read(self, first_day: str, last_day: str, key: str | None = None) -> list[Row]:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._turn.acquire()
                return await self._asked((first_day, last_day, key))
        except TimeoutError:
            raise DatabaseError("it did not answer in time") from None

    async def total(self, key: str, first_day: str, last_day: str) -> Counters:
        """All that ask for the same at the same time are one question."""
        question = (first_day, last_day, key)
        asked = self._totals.get(question)
        if asked is None:
            asked = self._totals[question] = asyncio.create_task(self.read(*question))
            asked.add_done_callback(lambda task: self._answered(question, task))
        return total(await asyncio.shield(asked))

    def _answered(self, question: _Question, task: asyncio.Task[list[Row]]) -> None:
        del self._totals[question]
        if not task.cancelled():
            task.exception()  # whoever asked may have left

    def _asked(self, question: _Question) -> asyncio.Future[list[Row]]:
        """The answer.  It is the next one's turn when it has come, whoever still waits for it."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Row]] = loop.create_future()

        def told(rows: list[Row], error: Exception | None) -> None:
            self._turn.release()
            if answer.done():
                return
            if error is None:
                answer.set_result(rows)
            else:
                answer.set_exception(error)

        def ask() -> None:
            rows: list[Row] = []
            failure: Exception | None = None
            try:
                rows = self._ledger.read(*question)
            except Exception as error:  # noqa: BLE001 - raised again where it is awaited
                failure = error
            with suppress(RuntimeError):  # the event loop has been closed meanwhile
                loop.call_soon_threadsafe(told, rows, failure)

        try:
            threading.Thread(target=ask, name="usage reader", daemon=True).start()
        except RuntimeError as error:
            self._turn.release()
            raise DatabaseError("no thread can be started") from error
        return answer
