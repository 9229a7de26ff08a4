"""Several generations read as one."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from ochat_serve.errors import ServerFault
from ochat_serve.generation import Delta, Generation, SamplingOptions, Update, Usage
from ochat_serve.together import generate_together
from tests.fakes import ScriptedEngine, Wait, words

OPTIONS = SamplingOptions(max_tokens=5, n=2)


class Scripts(ScriptedEngine):
    """Another script for each request."""

    def __init__(self, *scripts: Sequence[Update | Exception | Wait]) -> None:
        super().__init__()
        self._scripts = list(scripts)
        self.request_ids: list[str] = []

    @asynccontextmanager
    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        options: SamplingOptions,
        cache_salt: str | None = None,
    ) -> AsyncIterator[Generation]:
        self.script = self._scripts.pop(0)
        self.request_ids.append(request_id)
        async with super().generate(request_id, prompt_token_ids, options, cache_salt) as one:
            yield one


def of(engine: ScriptedEngine, usage: Usage, prompts: int = 2):
    work = [([place], OPTIONS) for place in range(prompts)]
    return generate_together("r", engine=engine, work=work, cache_salt="s", usage=usage)


async def read(generation: Generation) -> list[Update]:
    ready = asyncio.Event()
    generation.listen(ready.set)
    updates = []
    while not generation.finished:
        await asyncio.wait_for(ready.wait(), 5)
        ready.clear()
        if (update := generation.take()) is not None:
            updates.append(update)
    return updates


async def test_choices_stand_one_prompt_after_the_other() -> None:
    first = [*words("a", index=1), *words("b")]
    second = [*words("c", "d"), *words("e", index=1)]
    engine = Scripts(first, second)
    async with of(engine, Usage(2)) as generation:
        deltas = [delta for update in await read(generation) for delta in update.deltas]
    texts = dict.fromkeys(range(4), "")
    for delta in deltas:
        texts[delta.index] += delta.text
    assert texts == {0: "b", 1: "a", 2: "cd", 3: "e"}
    assert engine.request_ids == ["r-0", "r-1"]
    assert engine.cache_salts == ["s", "s"]
    assert [list(ids) for ids, _ in engine.requests] == [[0], [1]]


async def test_one_that_ends_early_is_waited_for_no_more() -> None:
    late = Wait()
    async with of(Scripts(words("a"), [late, *words("b")]), Usage(2)) as generation:
        reading = asyncio.create_task(read(generation))
        await asyncio.sleep(0.01)
        assert not generation.finished
        late.go.set()
        assert len(await reading) == 2


async def test_cached_tokens_are_those_of_all_prompts() -> None:
    late = Wait()
    usage = Usage(9)
    first = [Update([Delta(0, "a", 1)], 3), Update([Delta(0, "b", 1, "stop")], 3)]
    second = [late, Update([Delta(0, "c", 1, "stop")], 4)]
    async with of(Scripts(first, second), usage) as generation:
        reading = asyncio.create_task(read(generation))
        await asyncio.sleep(0.01)
        assert usage.cached_tokens == 3
        late.go.set()
        updates = await reading
    assert usage.cached_tokens == 7
    assert updates[0].cached_tokens == 3


async def test_leaving_ends_them_all() -> None:
    engine = Scripts([Wait()], [Wait()], [Wait()])
    async with of(engine, Usage(3), prompts=3) as generation:
        assert engine.running == 3
        assert generation.take() is None
    assert engine.running == 0


async def test_one_that_fails_is_the_failure_of_all() -> None:
    engine = Scripts([Wait()], [ServerFault()])
    with pytest.raises(ServerFault):
        async with of(engine, Usage(2)) as generation:
            await read(generation)
    assert engine.running == 0
