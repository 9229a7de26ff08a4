"""A few threads for work that takes long, shared fairly: the keys that wait take turns.

It must not know what the work is.
"""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
Key = str | None


@dataclass(eq=False, slots=True)
class _Turn:
    key: Key
    come: asyncio.Future[None]


class FairThreads:
    """``count`` threads, of which a key leaves one to others.  None is nobody's key, and may
    have them all.

    For one event loop.  Whoever is cancelled while waiting has left the queue.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._threads = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._running: Counter[Key] = Counter()
        # Of each key that waits; the one that has waited for the longest since its last turn first.
        self._lines: OrderedDict[Key, deque[_Turn]] = OrderedDict()

    @property
    def running(self) -> int:
        return self._running.total()

    @property
    def waiting(self) -> int:
        return sum(map(len, self._lines.values()))

    async def run(self, key: Key, work: Callable[[], T]) -> T:
        """What ``work`` returns, which a thread does."""
        loop = asyncio.get_running_loop()
        await self._turn(_Turn(key, loop.create_future()))
        working = self._threads.submit(work)

        def ended(_: Future[T]) -> None:
            with suppress(RuntimeError):  # the event loop has been closed meanwhile
                loop.call_soon_threadsafe(self._leave, key)

        working.add_done_callback(ended)
        return await asyncio.wrap_future(working)

    async def _turn(self, turn: _Turn) -> None:
        """Returns when a thread is its key's; ``_leave`` must follow."""
        self._lines.setdefault(turn.key, deque()).append(turn)
        self._admit()
        try:
            await turn.come
        except asyncio.CancelledError:
            if not turn.come.cancelled():  # it had come at the same moment
                self._leave(turn.key)
            elif turn in self._lines.get(turn.key, ()):
                self._take_out(turn)
            raise

    def _admit(self) -> None:
        while (turn := self._next()) is not None:
            self._take_out(turn)
            if turn.come.cancelled():
                continue
            if turn.key in self._lines:
                self._lines.move_to_end(turn.key)
            self._running[turn.key] += 1
            turn.come.set_result(None)

    def _next(self) -> _Turn | None:
        if self.running == self._count:
            return None
        turns = (line[0] for line in self._lines.values())
        return next((turn for turn in turns if self._may_begin(turn.key)), None)

    def _may_begin(self, key: Key) -> bool:
        return key is None or self._running[key] < max(1, self._count - 1)

    def _leave(self, key: Key) -> None:
        self._running[key] -= 1
        if not self._running[key]:
            del self._running[key]
        self._admit()

    def _take_out(self, turn: _Turn) -> None:
        line = self._lines[turn.key]
        line.remove(turn)
        if not line:
            del self._lines[turn.key]
