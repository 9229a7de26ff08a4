"""Several prompts of one request as one generation."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from ochat_serve.generation import (
    Delta,
    Engine,
    Generation,
    SamplingOptions,
    Update,
    Usage,
)

# A prompt's token ids, and how to go on from them
Work = tuple[Sequence[int], SamplingOptions]


class Together:
    """``generation.Generation`` over several: ``choices`` of the first, then of the second ..."""

    def __init__(self, parts: Sequence[Generation], choices: int, usage: Usage) -> None:
        self._parts = parts
        self._choices = choices
        self._usage = usage
        self._begun: set[int] = set()
        self._cached_tokens = 0

    @property
    def finished(self) -> bool:
        return all(part.finished for part in self._parts)

    def listen(self, ready: Callable[[], None]) -> None:
        for part in self._parts:
            part.listen(ready)

    def take(self) -> Update | None:
        deltas: list[Delta] = []
        for place, part in enumerate(self._parts):
            update = None if part.finished else part.take()
            if update is None:
                continue
            if place not in self._begun:
                self._begun.add(place)
                # Whoever reads asks at the first update only, when not all have begun.
                self._cached_tokens += update.cached_tokens
                self._usage.cached_tokens = self._cached_tokens
            for delta in update.deltas:
                delta.index += place * self._choices
                deltas.append(delta)
        return Update(deltas, self._cached_tokens) if deltas else None


@asynccontextmanager
async def generate_together(
    request_id: str,
    *,
    engine: Engine,
    work: Sequence[Work],
    cache_salt: str | None,
    usage: Usage,
) -> AsyncGenerator[Generation, None]:
    """Generate for all prompts within the context; leaving it early aborts those that run.
    ``usage`` is told of the cached tokens of each.  Entering raises ``errors.ApiError``."""
    async with AsyncExitStack() as stack:
        parts = [
            await stack.enter_async_context(
                engine.generate(f"{request_id}-{place}", token_ids, options, cache_salt)
            )
            for place, (token_ids, options) in enumerate(work)
        ]
        yield Together(parts, work[0][1].n, usage)
