"""Threads that are shared fairly: who goes next, and who is out."""

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from ochat_serve.fair_threads import FairThreads


class Work:
    """Pieces of work that end when they may, and the order in which they began."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._ends: dict[str, threading.Event] = {}

    def piece(self, name: str) -> Callable[[], str]:
        self._ends[name] = threading.Event()

        def do() -> str:
            self.begun.append(name)
            assert self._ends[name].wait(10)
            return name

        return do

    def end(self, *names: str) -> None:
        for name in names or tuple(self._ends):
            self._ends[name].set()


@pytest.fixture
def work() -> Iterator[Work]:
    work = Work()
    yield work
    work.end()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)


def start(threads: FairThreads, work: Work, *names: str) -> list[asyncio.Task[str]]:
    """A name's first letter is its key; a dash is nobody's."""
    return [
        asyncio.create_task(
            threads.run(None if name[0] == "-" else name[0], work.piece(name)), name=name
        )
        for name in names
    ]


async def test_a_keys_flood_leaves_a_thread_to_others(work: Work) -> None:
    threads = FairThreads(2, "test")
    flood = start(threads, work, *(f"a{n}" for n in range(50)))
    await until(lambda: work.begun == ["a0"])
    assert (threads.running, threads.waiting) == (1, 49)
    (other,) = start(threads, work, "b0")
    await until(lambda: work.begun == ["a0", "b0"])
    work.end()
    assert await other == "b0"
    assert await asyncio.gather(*flood) == [f"a{n}" for n in range(50)]
    await until(lambda: threads.running == 0)
    assert (threads._running, threads._lines) == ({}, {})


async def test_keys_take_turns_however_many_each_has_waiting(work: Work) -> None:
    threads = FairThreads(1, "test")
    names = ["a0", "a1", "a2", "a3", "b0", "b1", "c0"]
    asked = start(threads, work, *names)
    await until(lambda: threads.waiting == 6)
    work.end()
    await asyncio.gather(*asked)
    assert work.begun == ["a0", "a1", "b0", "c0", "a2", "b1", "a3"]


async def test_without_keys_all_threads_are_everybodys(work: Work) -> None:
    threads = FairThreads(2, "test")
    asked = start(threads, work, "-0", "-1", "-2")
    await until(lambda: len(work.begun) == 2)
    work.end()
    assert await asyncio.gather(*asked) == ["-0", "-1", "-2"]


async def test_who_leaves_while_waiting_is_out_of_the_queue(work: Work) -> None:
    threads = FairThreads(2, "test")
    asked = start(threads, work, "a0", "a1", "a2", "a3")
    await until(lambda: threads.waiting == 3)
    asked[1].cancel()
    asked[3].cancel()
    await until(lambda: threads.waiting == 1)
    work.end()
    done = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(each) for each in done] == [str, asyncio.CancelledError] * 2
    assert work.begun == ["a0", "a2"]


async def test_who_leaves_while_it_is_done_keeps_the_thread_until_its_end(work: Work) -> None:
    threads = FairThreads(1, "test")
    first, second = start(threads, work, "a0", "b0")
    await until(lambda: work.begun == ["a0"])
    first.cancel()
    await until(first.done)
    assert (threads.running, threads.waiting) == (1, 1)
    work.end()
    assert await second == "b0"


class Meddled(FairThreads):
    """Something happens when a thread becomes free, just before that is seen or just after."""

    before: Callable[[], object] = staticmethod(lambda: None)
    after: Callable[[], object] = staticmethod(lambda: None)

    def _leave(self, key: str | None) -> None:
        self.before()
        super()._leave(key)
        self.after()


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_who_leaves_when_its_turn_comes_takes_nothing_with_it(
    work: Work, moment: str
) -> None:
    threads = Meddled(1, "test")
    first, second, third = start(threads, work, "a0", "a1", "b0")
    await until(lambda: threads.waiting == 2)
    setattr(threads, moment, second.cancel)
    work.end()
    async with asyncio.timeout(10):
        assert [await first, await third] == ["a0", "b0"]
    with pytest.raises(asyncio.CancelledError):
        await second
    await until(lambda: threads.running == 0)
    assert (threads._running, threads._lines, work.begun) == ({}, {}, ["a0", "b0"])


async def test_an_error_comes_through_and_the_thread_is_free() -> None:
    threads = FairThreads(1, "test")
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await threads.run("a", lambda: 1 // 0)
    assert await threads.run("a", lambda: 5) == 5
