"""The words the layers share about one generation, and the seams behind them.

``Engine`` is the only way to a model: token ids in, deltas out.  ``PromptRenderer`` is the
only way from messages to token ids.  ``GrammarChecker`` knows which grammars can be served.
vLLM, transformers and xgrammar stand behind them; the tests put scripted ones there.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One message after checking: a known role and plain text."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a prompt is rendered from.  ``condition`` is OpenChat's role prefix, "" by default."""

    turns: tuple[ChatTurn, ...]
    condition: str = ""

    @property
    def continues(self) -> bool:
        """Whether the answer goes on from a last message by the assistant."""
        return bool(self.turns) and self.turns[-1].role == "assistant" and self.turns[-1].text != ""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must look like: a JSON schema, a regular expression, or a grammar in EBNF,
    which is our own for a ``choice``.  ``param`` and ``subject`` are for its errors."""

    kind: Literal["json", "regex", "grammar", "choice"]
    text: str = field(repr=False)
    param: str = field(compare=False)
    subject: str = field(compare=False)


# The schema of JSON mode.
ANY_OBJECT = '{"type":"object"}'


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How to sample, in vLLM's words.  ``max_tokens`` and ``stream_interval`` count tokens."""

    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None
    logprobs: int | None = None
    stream_interval: int = 1
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token with its log probability; ``token_bytes`` is exactly what it adds to the text."""

    token_bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The token that was sampled at one position, and the likeliest ones there."""

    sampled: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(slots=True)
class Delta:
    """What one choice gained.  ``num_tokens`` counts tokens, a stop token included."""

    index: int
    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    logprobs: Sequence[PositionLogprobs] | None = None


@dataclass(slots=True)
class Update:
    """What the engine has to tell: the deltas of one or more choices."""

    deltas: Sequence[Delta]
    cached_tokens: int = 0


@dataclass(slots=True)
class Usage:
    """Token counts of one request, over all choices."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a started engine knows about itself.  ``max_model_len`` counts tokens, and so does
    ``max_num_batched_tokens`` (of one step); ``max_num_seqs`` are choices at a time.  Without
    ``has_weights`` its answers are made up: random weights, or a simulation."""

    max_model_len: int
    vocab_size: int
    version: str
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    has_weights: bool = True


class Generation(Protocol):
    """One request inside the engine.  Its reader is called, not awaited: waking a task for
    every token of every stream would cost more than the token."""

    @property
    def finished(self) -> bool:
        """Whether the last update was taken."""
        ...

    def listen(self, ready: Callable[[], None]) -> None:
        """Have ``ready`` called when there is something to take; at once, if there is already.

        The call comes from inside the engine's work: it must be quick, and neither take nor raise.
        """
        ...

    def take(self) -> Update | None:
        """All that has come since the last call, in one update.

        Raises ``errors.ApiError`` for a generation that failed.
        """
        ...


class Engine(Protocol):
    """Token ids in, deltas out."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def failure(self) -> str | None:
        """Why nothing can be generated any more, or None."""
        ...

    @property
    def signs_of_life(self) -> int:
        """Grows with every step that the engine tells of, and with every ``answer``."""
        ...

    async def answer(self) -> None:
        """Returns when the engine has come round to answering, which it does between two steps:
        never, if it hangs.  Generates nothing."""
        ...

    def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        options: SamplingOptions,
        cache_salt: str | None = None,
    ) -> AbstractAsyncContextManager[Generation]:
        """Generate within the context.  Leaving it before the end aborts the work.

        What is computed for a prompt is used again only for prompts of the same ``cache_salt``.
        Entering raises ``errors.ApiError`` for options that the model refuses.
        """
        ...

    def metrics(self) -> bytes:
        """The engine's own metrics in Prometheus' text format, summed over front ends.  Blocks."""
        ...

    async def close(self) -> None: ...


class PromptRenderer(Protocol):
    """Messages or text in, token ids out.  No text can become a control token."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens with which the template ends a turn."""
        ...

    @property
    def default_temperature(self) -> float: ...

    @property
    def uses_condition(self) -> bool: ...

    @property
    def begins_with_space(self) -> bool:
        """Whether answers start with a space that is the tokenizer's, not the model's."""
        ...

    def is_long(self, conversation: Conversation) -> bool:
        """Whether its rendering may take some milliseconds of a thread, and wait for one."""
        ...

    async def render(
        self,
        conversation: Conversation,
        max_tokens: int | None = None,
        cache_salt: str | None = None,
    ) -> list[int]:
        """The prompt's token ids; what is remembered of them serves the same ``cache_salt`` only.

        Raises ``errors.InvalidRequest`` where the template refuses,
        ``errors.ContextLengthExceeded`` where text has more tokens than ``max_tokens`` however it
        is encoded; a prompt that fits is never refused by that."""
        ...

    async def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        cache_salt: str | None = None,
    ) -> list[int]:
        """The token ids of a text on its own, without any turn; in front, unless told otherwise,
        what the tokenizer puts before every text: the beginning of sequence, where the model has
        one.  For the rest as ``render``."""
        ...

    async def decode(self, token_ids: Sequence[int], cache_salt: str | None = None) -> str:
        """The text that token ids stand for, control tokens spelled out; ids outside the
        vocabulary stand for nothing.  Those of one ``cache_salt`` wait for each other, where there
        are many."""
        ...

    async def token_strs(
        self, token_ids: Sequence[int], cache_salt: str | None = None
    ) -> list[str]:
        """Each token as the vocabulary itself spells it (a space may be ``Ġ``)."""
        ...


class GrammarChecker(Protocol):
    """Nothing that it has not passed reaches the engine, where a bad grammar is everybody's."""

    async def checked(self, constraint: Constraint, caller: str | None) -> Constraint:
        """The constraint as the engine is to have it.

        Raises ``errors.InvalidRequest`` for what cannot be served, and ``errors.Unavailable`` where
        that cannot be found out now.  ``caller`` is the key that waits its turn."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model behind the server, once it is ready."""

    names: tuple[str, ...]
    engine: Engine
    prompts: PromptRenderer
    grammars: GrammarChecker
    created: int
    owned_by: str
    system_fingerprint: str = field(default="")

    def is_open_to(self, models: Sequence[str]) -> bool:
        """Whether a key that may use ``models`` (all, if there are none) may use this one."""
        return not models or any(name in models for name in self.names)
