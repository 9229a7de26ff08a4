"""Hermetic stand-ins for the seams of ``generation``: no model, no clock, no threads."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from ochat_serve.chat_service import ChatService
from ochat_serve.clock import periods
from ochat_serve.generation import (
    Constraint,
    Conversation,
    Delta,
    EngineInfo,
    SamplingOptions,
    ServedModel,
    Update,
)
from ochat_serve.limits import Limits, MemoryLimits
from ochat_serve.serving import Serving
from ochat_serve.settings import Settings


def words(*texts: str, finish: str = "stop", index: int = 0) -> list[Update]:
    """One update per text, the last one finished."""
    deltas = [Delta(index, text, 1) for text in texts]
    deltas[-1].finish_reason = finish  # type: ignore[assignment]
    return [Update([delta]) for delta in deltas]


class Wait:
    """A step of a script: nothing comes until ``go`` is set (for ever, if it never is)."""

    def __init__(self) -> None:
        self.go = asyncio.Event()


@dataclass
class ScriptedGeneration:
    """Gives one update at each ``take``, so that a test sees every one of its script."""

    finished: bool = False
    taken: int = 0
    _come: deque[Update | Exception] = field(default_factory=deque)
    _played: bool = False
    _ready: Callable[[], None] = lambda: None

    @property
    def waiting(self) -> int:
        """How many updates have come and were not taken."""
        return len(self._come)

    async def play(self, script: Sequence[Update | Exception | Wait]) -> None:
        for step in script:
            if isinstance(step, Wait):
                await step.go.wait()
                continue
            await asyncio.sleep(0)
            self._played = step is script[-1]
            self._come.append(step)
            self._ready()

    def listen(self, ready: Callable[[], None]) -> None:
        self._ready = ready
        if self._come:
            ready()

    def take(self) -> Update | None:
        if not self._come:
            return None
        step = self._come.popleft()
        self.taken += 1
        if isinstance(step, Exception):
            raise step
        if self._come:
            self._ready()
        self.finished = self._played and not self._come
        # Each request gets deltas of its own: a reader may change them.
        deltas = [
            Delta(d.index, d.text, d.num_tokens, d.finish_reason, d.logprobs) for d in step.deltas
        ]
        return Update(deltas, step.cached_tokens)


@dataclass
class ScriptedEngine:
    """Plays one script for every request: updates come, errors are raised, waits waited."""

    script: Sequence[Update | Exception | Wait] = field(default_factory=lambda: words("Hi", "!"))
    info: EngineInfo = field(
        default_factory=lambda: EngineInfo(max_model_len=100, vocab_size=1_000, version="0")
    )
    failure: str | None = None
    running: int = 0
    requests: list[tuple[Sequence[int], SamplingOptions]] = field(default_factory=list)
    cache_salts: list[str | None] = field(default_factory=list)
    generations: list[ScriptedGeneration] = field(default_factory=list)
    refuses: Exception | None = None
    closed: bool = False
    signs_of_life: int = 0
    questions: int = 0
    answers: asyncio.Event | None = None  # None: it answers at once
    ends: Wait | None = None  # what the end of every request waits for

    async def answer(self) -> None:
        self.questions += 1
        if self.answers is not None:
            await self.answers.wait()
        self.signs_of_life += 1

    @asynccontextmanager
    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        options: SamplingOptions,
        cache_salt: str | None = None,
    ) -> AsyncGenerator["ScriptedGeneration", None]:
        if self.refuses is not None:
            raise self.refuses
        self.requests.append((prompt_token_ids, options))
        self.cache_salts.append(cache_salt)
        self.running += 1
        generation = ScriptedGeneration()
        self.generations.append(generation)
        player = asyncio.create_task(generation.play(self.script))
        try:
            yield generation
        finally:
            player.cancel()
            if self.ends is not None:
                await self.ends.go.wait()
            self.running -= 1

    def metrics(self) -> bytes:
        return b"vllm:requests 1\n"

    async def close(self) -> None:
        self.closed = True


@dataclass
class WordPrompts:
    """Renders every word as one token: its length; 1 stands before a text on its own."""

    stop_token_ids: tuple[int, ...] = (7,)
    default_temperature: float = 0.7
    uses_condition: bool = True
    begins_with_space: bool = False

    def is_long(self, conversation: Conversation) -> bool:
        return False

    async def render(
        self,
        conversation: Conversation,
        max_tokens: int | None = None,
        cache_salt: str | None = None,
    ) -> list[int]:
        return [len(word) for turn in conversation.turns for word in turn.text.split()]

    async def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        cache_salt: str | None = None,
    ) -> list[int]:
        return [1] * add_special_tokens + [len(word) for word in text.split()]

    async def decode(self, token_ids: Sequence[int], cache_salt: str | None = None) -> str:
        return " ".join("x" * token_id for token_id in token_ids)

    async def token_strs(
        self, token_ids: Sequence[int], cache_salt: str | None = None
    ) -> list[str]:
        return ["x" * token_id for token_id in token_ids]


@dataclass
class ScriptedGrammars:
    """Passes every grammar, or raises ``refuses``."""

    refuses: Exception | None = None
    asked: list[tuple[Constraint, str | None]] = field(default_factory=list)
    closed: bool = False

    async def checked(self, constraint: Constraint, caller: str | None) -> Constraint:
        self.asked.append((constraint, caller))
        if self.refuses is not None:
            raise self.refuses
        return replace(constraint, text=f"checked {constraint.text}")

    async def close(self) -> None:
        self.closed = True


def served(
    engine: ScriptedEngine,
    prompts: WordPrompts | None = None,
    grammars: ScriptedGrammars | None = None,
) -> ServedModel:
    return ServedModel(
        names=("openchat_3.6", "openchat/openchat-3.6-8b-20240522"),
        engine=engine,
        prompts=prompts or WordPrompts(),
        grammars=grammars or ScriptedGrammars(),
        created=1_700_000_000,
        owned_by="openchat",
        system_fingerprint="fp_0",
    )


def service(
    engine: ScriptedEngine,
    settings: Settings | None = None,
    prompts: WordPrompts | None = None,
    limits: Limits | None = None,
    grammars: ScriptedGrammars | None = None,
) -> ChatService:
    return ChatService(
        served(engine, prompts, grammars),
        settings or Settings(),
        clock=lambda: 0.0,
        now=lambda: 1_700_000_000.0,
        limits=limits or MemoryLimits(lambda: 1_700_000_000.0, periods),
        cache_secret=b"secret",
    )


def serving(
    engine: ScriptedEngine,
    settings: Settings | None = None,
    prompts: WordPrompts | None = None,
    grammars: ScriptedGrammars | None = None,
) -> Serving:
    return Serving(phase="ready", chat=service(engine, settings, prompts, grammars=grammars))
