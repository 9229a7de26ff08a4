"""One request from its admission to its end, whatever ends it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from ochat_serve.admission import Admission
from ochat_serve.caller import Caller, KeyLimits
from ochat_serve.clock import periods
from ochat_serve.errors import ApiError, DeadlineExceeded, RateLimited, ServerFault, Unavailable
from ochat_serve.generation import Generation, SamplingOptions, Usage
from ochat_serve.limits import MemoryLimits
from ochat_serve.request_log import RequestRecord
from ochat_serve.run import Run, RunningChats, Terms
from tests.fakes import ScriptedEngine, Wait


class Place:
    """One place in an engine that never answers, and runs that want it."""

    def __init__(self, max_queue: int = 5, **limits: int) -> None:
        self.admission = Admission(
            slots=1, max_queue=max_queue, max_queue_tokens=100, step_tokens=100
        )
        self.engine = ScriptedEngine(script=[Wait()])
        self.running = RunningChats()
        self._caller = Caller("alice", limits=KeyLimits(**limits))
        self._limits = MemoryLimits(lambda: 0.0, periods)

    def run(self, elapsed: float = 0.0) -> Run:
        record = RequestRecord(time=0, request_id="r", method="POST", path="/")
        record.usage = Usage(prompt_tokens=3)
        record.finish_reasons = [None]
        return Run(
            context=self.engine.generate("id", [1, 2, 3], SamplingOptions(max_tokens=5)),
            terms=Terms(
                caller=self._caller,
                choices=1,
                places=1,
                max_tokens=5,
                queue_timeout_s=60,
                timeout_s=60,
                elapsed=lambda: elapsed,
            ),
            record=record,
            spaces=None,
            admission=self.admission,
            limits=self._limits,
            running=self.running,
        )


def timers(run: Run) -> list[asyncio.TimerHandle]:
    return [timer for timer in (run._timer, run._queue_timer) if timer is not None]


async def test_nothing_stays_behind() -> None:
    place = Place(parallel_requests=2)
    async with place.run() as first, place.run() as second:
        assert len(place.running) == 2
        assert (place.admission.running, place.admission.waiting) == (1, 1)
    assert (place.admission.running, place.admission.waiting, len(place.running)) == (0, 0, 0)
    assert all(timer.cancelled() for run in (first, second) for timer in timers(run))
    assert len(timers(second)) == 2
    async with place.run(), place.run():
        pass


async def test_what_never_ran_used_nothing() -> None:
    place = Place()
    async with place.run() as first, place.run() as second:
        pass
    assert first.record.usage == Usage(prompt_tokens=3)
    assert second.record.usage is None


@pytest.mark.parametrize("place", [Place(max_queue=0), Place(parallel_requests=1)])
async def test_what_is_refused_used_nothing(place: Place) -> None:
    refused = place.run()
    async with place.run():
        with pytest.raises((Unavailable, RateLimited)):
            await refused.__aenter__()
    assert refused.record.usage is None
    assert place.admission.running == 0


async def test_what_failed_in_the_queue_never_reaches_the_engine() -> None:
    place = Place()
    first, second = place.run(), place.run()
    async with second_of(first, second):
        second.fail(ServerFault())
        assert place.admission.waiting == 0
        await first.__aexit__(None, None, None)
        await asyncio.sleep(0)
        assert len(place.engine.requests) == 1
        with pytest.raises(ServerFault):
            second.take()


@asynccontextmanager
async def second_of(first: Run, second: Run) -> AsyncGenerator[None, None]:
    await first.__aenter__()
    async with second:
        yield


async def test_leaving_while_the_engine_is_being_told_waits_for_that() -> None:
    """Or the engine would begin what nobody waits for."""
    place = Place()
    told: list[str] = []

    @asynccontextmanager
    async def slow(*_: object) -> AsyncGenerator[Generation, None]:
        try:
            await asyncio.sleep(60)
            yield None
        finally:
            await asyncio.sleep(0)
            told.append("aborted")

    first, second = place.run(), place.run()
    second._context = slow()
    async with second_of(first, second):
        await first.__aexit__(None, None, None)
        await asyncio.sleep(0.01)
    assert told == ["aborted"]
    assert place.admission.running == 0


async def test_what_is_out_of_time_before_it_begins_never_reaches_the_engine() -> None:
    """Encoding a long prompt takes time, too."""
    place = Place()
    late = place.run(elapsed=60.0)
    with pytest.raises(DeadlineExceeded):
        await late.__aenter__()
    assert late.record.usage is None
    assert place.engine.requests == []
    assert (place.admission.running, len(place.running)) == (0, 0)


async def test_what_fails_on_its_way_from_the_queue_never_reaches_the_engine() -> None:
    place = Place()
    first, second = place.run(), place.run()
    async with second_of(first, second):
        await first.__aexit__(None, None, None)
        second.fail(ServerFault())  # it has its place; its task has not run yet
        await asyncio.sleep(0.01)
        assert len(place.engine.requests) == 1
    assert place.admission.running == 0


async def test_who_comes_after_all_were_given_up_is_given_up_too() -> None:
    place = Place()
    async with place.run():
        place.running.fail(Unavailable("Enough.", code="shutting_down", retry_after_s=5))
        with pytest.raises(Unavailable, match="Enough"):
            await place.run().__aenter__()
    assert len(place.engine.requests) == 1
    assert (place.admission.running, place.admission.waiting) == (0, 0)


async def test_a_cancelled_task_leaves_nothing_in_the_engine() -> None:
    """One that waited in the queue: its start is long done and needs no waiting for."""
    place = Place()
    first, second = place.run(), place.run()

    async def request() -> None:
        async with second:
            await asyncio.Event().wait()

    async with first:
        task = asyncio.create_task(request())
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert place.engine.running == 1
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()  # once more, while it cleans up
    await asyncio.wait((task,))
    assert (place.engine.running, place.admission.running) == (0, 0)


async def test_the_first_error_counts() -> None:
    place = Place()
    async with place.run() as run:
        called: list[int] = []
        run.listen(lambda: called.append(1))
        run.fail(Unavailable("one", code="overloaded", retry_after_s=1))
        run.fail(ServerFault())
        with pytest.raises(ApiError, match="one"):
            run.take()
    assert called == [1]
    assert run.record.error == "overloaded"
