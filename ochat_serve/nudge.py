"""Files that are looked at again and again can be looked at now."""

import asyncio


class Nudge:
    """For those who wait on one event loop, all at once."""

    def __init__(self) -> None:
        self._given = asyncio.Event()

    def give(self) -> None:
        """Whoever waits now goes on."""
        self._given.set()
        self._given.clear()

    async def within(self, time_s: float) -> bool:
        """Wait for a nudge, or ``time_s``.  Whether there was one."""
        try:
            async with asyncio.timeout(time_s):
                return await self._given.wait()
        except TimeoutError:
            return False
