"""From a checked request to a chat that is ready to begin.

Whatever can be refused is refused in ``ChatService.prepare``, before any work has started.
"""

import hmac
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TypeVar

import shortuuid

from ochat_serve.admission import Admission
from ochat_serve.caller import Caller
from ochat_serve.chat import Chat, StartRun
from ochat_serve.chat_request import (
    Limits,
    ReplyForm,
    check_sampling,
    conversation,
    ignored_fields,
    refuse_unserved,
    reply_form,
    sampling_options,
)
from ochat_serve.constraint import constraint_of
from ochat_serve.errors import InvalidRequest, ModelNotFound, PermissionDenied
from ochat_serve.generation import (
    Constraint,
    Conversation,
    EngineInfo,
    SamplingOptions,
    ServedModel,
    Usage,
)
from ochat_serve.health import Health
from ochat_serve.limits import Limits as KeyLimits
from ochat_serve.notes import logged, notes, printable
from ochat_serve.protocol.chat import ChatCompletionRequest
from ochat_serve.protocol.sampling import SamplingRequest
from ochat_serve.protocol.tokens import DetokenizeRequest
from ochat_serve.request_log import RequestRecord
from ochat_serve.run import Run, RunningChats, Terms
from ochat_serve.settings import Settings
from ochat_serve.streaming import ReplyHead

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A chat's prompt, and what was found out on the way to it."""

    conversation: Conversation
    token_ids: list[int]
    salt: str | None
    form: ReplyForm
    ignored: list[str]
    constraint: Constraint | None


class ChatService:
    """Answers chat requests with one model.  ``clock`` gives seconds from any fixed point,
    ``now`` Unix seconds.  ``cache_secret``: see ``cache_salt``."""

    def __init__(
        self,
        served: ServedModel,
        settings: Settings,
        *,
        clock: Callable[[], float],
        now: Callable[[], float],
        limits: KeyLimits,
        cache_secret: bytes,
    ) -> None:
        self.served = served
        self.health = Health(served.engine, settings.stall_s)
        self.running = RunningChats()
        self._key_limits = limits
        self.admission = _admission(served.engine.info, settings)
        self._queue_timeout_s = settings.queue_timeout_s
        self._request_timeout_s = settings.request_timeout_s
        self._cache_secret = cache_secret
        self._strict = settings.strict_parameters
        self._clock = clock
        self._now = now
        temperature = settings.default_temperature
        self.sampling_limits = Limits(
            max_model_len=served.engine.info.max_model_len,
            vocab_size=served.engine.info.vocab_size,
            max_n=settings.max_n,
            max_places=_slots(served.engine.info, settings),
            default_temperature=(
                served.prompts.default_temperature if temperature is None else temperature
            ),
            template_stop_ids=served.prompts.stop_token_ids,
            stream_interval=settings.stream_interval,
        )

    async def prepare(
        self,
        request: ChatCompletionRequest,
        record: RequestRecord,
        caller: Caller,
        timeout_s: float = math.inf,
    ) -> Chat:
        """Check everything, render the prompt.  Raises ``ApiError``; starts no work.
        ``timeout_s`` is what the client wants to wait at most."""
        elapsed = self.stopwatch()
        prompt = await self.prompt(request, record, caller)
        options = sampling_options(request, self.sampling_limits, len(prompt.token_ids))
        if prompt.constraint is not None:
            constraint = await self.served.grammars.checked(prompt.constraint, caller.name)
            options = replace(options, constraint=constraint)
        record.usage = Usage(prompt_tokens=len(prompt.token_ids))
        record.parameters = logged(options, prompt.form)
        chat = Chat(
            head=self.reply_head("chatcmpl", record),
            form=prompt.form,
            options=options,
            record=record,
            generate=partial(
                self.served.engine.generate,
                prompt_token_ids=prompt.token_ids,
                options=options,
                cache_salt=prompt.salt,
            ),
            run=self.on_terms(caller, [options], elapsed, timeout_s),
            drops_first_space=(
                self.served.prompts.begins_with_space
                and not prompt.conversation.continues
                and prompt.constraint is None  # a space that a grammar asks for is the answer's
            ),
            keep_outputs=record.keeps_content,
        )
        chat.headers |= notes(prompt.ignored, request, options)
        return chat

    async def prompt(
        self, request: ChatCompletionRequest, record: RequestRecord, caller: Caller
    ) -> Prompt:
        """What the model is to see.  Raises ``ApiError`` for all that a chat is refused for
        before its prompt is known."""
        record.user = request.user or request.safety_identifier
        record.metadata = request.metadata
        self.accept(request, record, caller)
        refuse_unserved(request)
        form = reply_form(request)
        ignored = ignored_fields(request, uses_condition=self.served.prompts.uses_condition)
        self.refuse_if_strict(ignored)
        check_sampling(request, self.sampling_limits)
        constraint = constraint_of(request, self.sampling_limits.template_stop_ids)
        said = conversation(request)
        salt = self.salt(caller)
        most = self.sampling_limits.max_model_len
        render = partial(self.served.prompts.render, said, most, salt)
        token_ids = await self.encoded(caller, said, render)
        return Prompt(said, token_ids, salt, form, ignored, constraint)

    def accept(
        self, request: SamplingRequest | DetokenizeRequest, record: RequestRecord, caller: Caller
    ) -> None:
        """Note in the record what a request says, and check that the caller may ask this model.
        Raises ``ModelNotFound`` and ``PermissionDenied``."""
        record.model = self._model_name(request.model, caller)
        if record.keeps_content:
            record.request = request.model_dump_json(exclude_unset=True)

    def refuse_if_strict(self, ignored: list[str]) -> None:
        """Raises ``InvalidRequest`` for fields without effect, where those are refused."""
        if ignored and self._strict:
            raise InvalidRequest(
                f"Unrecognized request argument supplied: {printable(ignored)}.",
                param=ignored[0][:64],
                code="unknown_parameter",
            )

    def salt(self, caller: Caller) -> str | None:
        return cache_salt(self._cache_secret, caller.name)

    def reply_head(self, prefix: str, record: RequestRecord) -> ReplyHead:
        """Of a new answer, whose id stands in the record, too."""
        record.id = f"{prefix}-{shortuuid.uuid()}"
        return ReplyHead(
            id=record.id,
            created=int(self._now()),
            model=record.model or self.served.names[0],
            system_fingerprint=self.served.system_fingerprint,
        )

    def stopwatch(self) -> Callable[[], float]:
        """How many seconds have passed since this call."""
        begun = self._clock()
        return lambda: self._clock() - begun

    def on_terms(
        self,
        caller: Caller,
        options: Sequence[SamplingOptions],
        elapsed: Callable[[], float],
        timeout_s: float,
    ) -> StartRun:
        """A run of one or more prompts, each with its options, ``elapsed`` since its arrival."""
        return partial(
            Run,
            terms=Terms(
                caller=caller,
                choices=sum(each.n for each in options),
                # Greedy choices are copies of one.
                places=sum(each.n if each.temperature else 1 for each in options),
                max_tokens=max(each.max_tokens for each in options),
                queue_timeout_s=self._queue_timeout_s,
                timeout_s=min(timeout_s, self._request_timeout_s),
                elapsed=elapsed,
            ),
            admission=self.admission,
            limits=self._key_limits,
            running=self.running,
        )

    async def encoded(
        self, caller: Caller, said: Conversation, encode: Callable[[], Awaitable[T]]
    ) -> T:
        """What ``encode`` makes of all that is ``said``.

        A long prompt is one of its key's parallel requests already, and refused before it costs
        anything if the key has nothing left: even one token would be too many."""
        if not (caller.is_limited and self.served.prompts.is_long(said)):
            return await encode()
        held, _ = await self._key_limits.reserve(caller, 1)
        try:
            return await encode()
        finally:
            await self._key_limits.settle(held, 0)

    def _model_name(self, model: str | None, caller: Caller) -> str:
        """The name to answer with.  Raises ``ModelNotFound`` for a model not served here, and
        ``PermissionDenied`` for one that this key may not use."""
        names = self.served.names
        if not model or model in names:
            if not self.served.is_open_to(caller.models):
                raise PermissionDenied(
                    f"This API key may not use the model `{model or names[0]}`.",
                    param="model",
                    code="model_not_allowed",
                )
            return model or names[0]
        raise ModelNotFound(
            f"The model `{model[:100]}` does not exist. This server has: "
            f"{', '.join(f'`{name}`' for name in names)}.",
            param="model",
        )


def _admission(info: EngineInfo, settings: Settings) -> Admission:
    """This front end's share of the places and of the queue."""
    share = settings.api_server_count
    return Admission(
        slots=_slots(info, settings),
        max_queue=math.ceil(settings.max_queue / share),
        max_queue_tokens=math.ceil(settings.max_queue_tokens / share),
        step_tokens=info.max_num_batched_tokens,
    )


def _slots(info: EngineInfo, settings: Settings) -> int:
    """Choices that this front end may have in the engine at a time: its share and no more, for all
    together must not pass what was said."""
    return max(1, (settings.max_inflight or info.max_num_seqs) // settings.api_server_count)


@lru_cache(4096)  # asked of every request
def cache_salt(secret: bytes, key: str | None) -> str | None:
    """What keeps a key's cached prompts from serving others: whoever shares a cache can tell by
    the time to the first token what another has asked.  Not to be guessed without the secret, and
    not the client's to choose; None without keys, where all are one."""
    return None if key is None else hmac.digest(secret, key.encode(), "sha256").hex()
