"""Whether the engine moves, told without giving it work.

A step of the engine is a sign of life, long prefills included: they are made of steps.  Where no
sign comes (nothing to do, or a step that has nothing to tell), the engine is asked; it answers
between two steps.  So a hung engine is seen whether it has work or not, and a busy one is never
asked.
"""

import asyncio

from ochat_serve.generation import Engine

_MAX_INTERVAL_S = 5


class Health:
    """``stalled`` when no sign of life came for ``stall_s``.  ``tick`` must be called every
    ``interval_s``, in the event loop.

    Silence is counted in ticks, not by a clock: a server that was itself stopped for a while has
    heard nothing and knows nothing.
    """

    def __init__(self, engine: Engine, stall_s: float) -> None:
        self.stall_s = stall_s
        self.interval_s = min(_MAX_INTERVAL_S, stall_s / 4)
        self._engine = engine
        self._signs = engine.signs_of_life
        self._silent_s = 0.0
        self._question: asyncio.Task[None] | None = None

    @property
    def stalled(self) -> bool:
        return self._silent_s >= self.stall_s and self._signs == self._engine.signs_of_life

    def tick(self) -> None:
        signs = self._engine.signs_of_life
        if signs != self._signs:
            self._signs = signs
            self._silent_s = 0.0
            return
        self._silent_s += self.interval_s
        if self._question is None:
            self._question = asyncio.create_task(self._engine.answer())
            self._question.add_done_callback(self._answered)

    def close(self) -> None:
        if self._question is not None:
            self._question.cancel()

    def _answered(self, question: asyncio.Task[None]) -> None:
        self._question = None
        if not question.cancelled():
            question.exception()  # an engine that cannot be asked any more says so by ``failure``
