"""Waiting for a time, or for a nudge."""

import asyncio

from ochat_serve.nudge import Nudge


async def test_all_who_wait_go_on_at_once_and_wait_again_after() -> None:
    nudge = Nudge()
    waiting = [asyncio.create_task(nudge.within(600)) for _ in range(3)]
    await asyncio.sleep(0)
    nudge.give()
    assert await asyncio.gather(*waiting) == [True] * 3
    assert not await nudge.within(0.01)
