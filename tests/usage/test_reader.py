"""Reading the ledger from an event loop, while its database hangs."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from ochat_serve.usage.counters import Counters, Row
from ochat_serve.usage.database import DatabaseError
from ochat_serve.usage.reader import LedgerReader
from tests.usage.accounts import DAY, EVER, of

ROWS = [Row("a", DAY, of(2))]


class Slow:
    """A ledger that answers when it may."""

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.failure: Exception | None = None
        self.asked: list[tuple[object, ...]] = []

    def read(self, *question: object) -> list[Row]:
        self.asked.append(question)
        assert self.may_answer.wait(10)
        if self.failure is not None:
            raise self.failure
        return ROWS


@pytest.fixture
def slow() -> Iterator[Slow]:
    slow = Slow()
    yield slow
    slow.may_answer.set()


async def test_it_reads(slow: Slow):
    slow.may_answer.set()
    reader = LedgerReader(slow)
    assert await reader.read(*EVER) == ROWS
    assert await reader.total("a", *EVER) == of(2)
    assert slow.asked == [(*EVER, None), (*EVER, "a")]


async def test_whoever_asks_is_told_in_time_and_one_thread_waits(slow: Slow):
    reader = LedgerReader(slow, timeout_s=0.05)
    for _ in range(3):
        with pytest.raises(DatabaseError, match="did not answer in time"):
            await reader.read(*EVER)
    assert len(slow.asked) == 1
    slow.may_answer.set()
    assert await LedgerReader(slow).read(*EVER) == ROWS
    async with asyncio.timeout(10):
        while True:  # until the one that hung has come back
            try:
                assert await reader.read(*EVER) == ROWS
                break
            except DatabaseError:
                continue


async def test_many_that_ask_for_the_same_are_one_question(slow: Slow):
    reader = LedgerReader(slow)
    asking = [asyncio.create_task(reader.total("a", *EVER)) for _ in range(10)]
    await asyncio.sleep(0)
    asking[0].cancel()  # whoever asked first may leave
    slow.may_answer.set()
    first, *others = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(first, asyncio.CancelledError)
    assert others == [of(2)] * 9
    assert len(slow.asked) == 1
    assert await reader.total("a", *EVER) == of(2)
    assert len(slow.asked) == 2, "what was true then need not be true now"


async def test_its_errors_come_through(slow: Slow):
    slow.failure = DatabaseError("full")
    slow.may_answer.set()
    reader = LedgerReader(slow)
    for _ in range(2):
        told = await asyncio.gather(
            *(reader.total("a", *EVER) for _ in range(3)), return_exceptions=True
        )
        assert told == [slow.failure] * 3
    slow.failure = None
    assert await reader.total("a", *EVER) != Counters()
