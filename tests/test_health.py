"""Whether the engine moves: seen by its steps, and by its answers where it has no step to tell."""

import asyncio
import gc

import pytest

from ochat_serve.health import Health
from tests.fakes import ScriptedEngine

STALL_S = 8.0  # four ticks of two seconds


@pytest.fixture
def hung() -> ScriptedEngine:
    """It answers when its event is set."""
    return ScriptedEngine(answers=asyncio.Event())


async def tick(health: Health, count: int = 1) -> None:
    for _ in range(count):
        health.tick()
        await asyncio.sleep(0)
        await asyncio.sleep(0)


@pytest.mark.parametrize(("stall_s", "interval_s"), [(2, 0.5), (8, 2), (60, 5), (600, 5)])
def test_it_looks_four_times_in_that_time_or_every_five_seconds(
    stall_s: float, interval_s: float
) -> None:
    assert Health(ScriptedEngine(), stall_s).interval_s == interval_s


async def test_an_idle_engine_that_answers_is_well() -> None:
    engine = ScriptedEngine()
    health = Health(engine, STALL_S)
    await tick(health, 20)
    assert not health.stalled
    assert engine.questions == 10, "one tick asks, the next one has heard"


async def test_an_engine_that_steps_is_never_asked() -> None:
    engine = ScriptedEngine(answers=asyncio.Event())
    health = Health(engine, STALL_S)
    for _ in range(20):
        engine.signs_of_life += 1
        await tick(health)
        assert not health.stalled
    assert engine.questions == 0


async def test_an_engine_without_a_sign_is_stalled_in_time_and_asked_once(
    hung: ScriptedEngine,
) -> None:
    health = Health(hung, STALL_S)
    await tick(health, 3)
    assert not health.stalled
    await tick(health)
    assert health.stalled
    await tick(health, 10)
    assert hung.questions == 1


async def test_it_is_well_again_at_the_first_step(hung: ScriptedEngine) -> None:
    health = Health(hung, STALL_S)
    await tick(health, 5)
    assert health.stalled
    hung.signs_of_life += 1
    assert not health.stalled, "without waiting for the next tick"
    await tick(health)
    assert not health.stalled
    await tick(health, 4)
    assert health.stalled, "silence is counted anew"


async def test_it_is_well_again_at_the_answer(hung: ScriptedEngine) -> None:
    health = Health(hung, STALL_S)
    await tick(health, 5)
    assert hung.answers is not None
    hung.answers.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not health.stalled
    await tick(health, 20)
    assert not health.stalled


async def test_an_engine_that_refuses_to_answer_gives_no_sign() -> None:
    """And its refusal is nothing that asyncio would complain of."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))

    class Refusing(ScriptedEngine):
        async def answer(self) -> None:
            self.questions += 1
            raise RuntimeError("shutting down")

    engine = Refusing()
    health = Health(engine, STALL_S)
    await tick(health, 4)
    assert health.stalled
    assert engine.questions == 4
    gc.collect()
    assert complaints == []


async def test_closing_takes_the_question_back(hung: ScriptedEngine) -> None:
    health = Health(hung, STALL_S)
    await tick(health)
    health.close()
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1
