"""The life of one chat request, from checked fields to bytes.

Whatever can fail with an HTTP status fails in ``ChatService.prepare`` or before the first
update; what fails later becomes an error event in the stream.
"""

import json
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import asdict

import shortuuid

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
from ochat_serve.errors import ApiError, InvalidRequest, ModelNotFound
from ochat_serve.generation import SamplingOptions, ServedModel, Update, Usage
from ochat_serve.protocol.chat import ChatCompletionRequest
from ochat_serve.request_log import RequestRecord
from ochat_serve.settings import Settings
from ochat_serve.streaming import (
    DONE,
    Collector,
    EventWriter,
    ReplyHead,
    error_event,
    without_first_space,
)

IGNORED_HEADER = "x-ochat-ignored"
MAX_TOKENS_HEADER = "x-ochat-max-tokens"


class ChatService:
    """Answers chat requests with one model.  ``clock`` gives seconds from any fixed point,
    ``now`` Unix seconds."""

    def __init__(
        self,
        served: ServedModel,
        settings: Settings,
        *,
        clock: Callable[[], float],
        now: Callable[[], float],
        log_content: bool = False,
    ) -> None:
        self.served = served
        self._strict = settings.strict_parameters
        self._log_content = log_content
        self._clock = clock
        self._now = now
        temperature = settings.default_temperature
        self._limits = Limits(
            max_model_len=served.engine.info.max_model_len,
            vocab_size=served.engine.info.vocab_size,
            max_n=settings.max_n,
            default_temperature=(
                served.prompts.default_temperature if temperature is None else temperature
            ),
            template_stop_ids=served.prompts.stop_token_ids,
            stream_interval=settings.stream_period,
        )

    async def prepare(self, request: ChatCompletionRequest, record: RequestRecord) -> "Chat":
        """Check everything, render the prompt.  Raises ``ApiError``; starts no work."""
        arrived = self._clock()
        record.user = request.user or request.safety_identifier
        record.metadata = request.metadata
        record.model = self._model_name(request.model)
        if self._log_content:
            record.request = json.loads(request.model_dump_json(exclude_unset=True))
        refuse_unserved(request)
        form = reply_form(request)
        ignored = ignored_fields(request, uses_condition=self.served.prompts.uses_condition)
        if ignored and self._strict:
            raise InvalidRequest(
                f"Unrecognized request argument supplied: {_printable(ignored)}.",
                param=ignored[0][:64],
                code="unknown_parameter",
            )
        check_sampling(request, self._limits)
        prompt = conversation(request)
        prompt_token_ids = await self.served.prompts.render(prompt)
        record.usage = Usage(prompt_tokens=len(prompt_token_ids))
        options = sampling_options(request, self._limits, len(prompt_token_ids))
        record.parameters = _logged(options, form)
        chat = Chat(
            head=ReplyHead(
                id=f"chatcmpl-{shortuuid.uuid()}",
                created=int(self._now()),
                model=record.model,
                system_fingerprint=self.served.system_fingerprint,
            ),
            form=form,
            options=options,
            record=record,
            updates=self._updates(prompt_token_ids, options, prompt.continues),
            elapsed=lambda: self._clock() - arrived,
            keep_outputs=self._log_content,
        )
        record.id = chat.head.id
        chat.headers |= _notes(ignored, request, options)
        return chat

    def _updates(
        self, prompt_token_ids: list[int], options: SamplingOptions, continues: bool
    ) -> Callable[[str], AsyncGenerator[Update, None]]:
        def start(request_id: str) -> AsyncGenerator[Update, None]:
            updates = self.served.engine.generate(request_id, prompt_token_ids, options)
            if self.served.prompts.begins_with_space and not continues:
                return without_first_space(updates)
            return updates

        return start

    def _model_name(self, model: str | None) -> str:
        """The name to answer with.  Raises ``ModelNotFound`` for a model not served here."""
        names = self.served.names
        if not model:
            return names[0]
        if model in names:
            return model
        raise ModelNotFound(
            f"The model `{model[:100]}` does not exist. This server has: "
            f"{', '.join(f'`{name}`' for name in names)}.",
            param="model",
        )


class Chat:
    """One request on its way: iterate ``events`` or await ``body``, once."""

    def __init__(
        self,
        *,
        head: ReplyHead,
        form: ReplyForm,
        options: SamplingOptions,
        record: RequestRecord,
        updates: Callable[[str], AsyncGenerator[Update, None]],
        elapsed: Callable[[], float],
        keep_outputs: bool,
    ) -> None:
        self.head = head
        self.form = form
        self.headers: dict[str, str] = {}
        self._options = options
        self._record = record
        self._start = updates
        self._elapsed = elapsed
        self._keep_outputs = keep_outputs

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Whole server-sent events, as bytes to be written at once.

        Raises ``ApiError`` before the first bytes; later errors are events.
        """
        writer = EventWriter(
            self.head,
            usage=self.form.include_usage,
            logprobs=self._options.logprobs is not None,
            obfuscation=self.form.include_obfuscation,
        )
        outputs = Collector(self._options.n) if self._keep_outputs else None
        begun = False
        try:
            async with aclosing(self._counted()) as updates:
                async for update in updates:
                    if outputs is not None:
                        outputs.add(update.deltas)
                    events = writer.deltas(update.deltas)
                    if not begun:
                        begun = True
                        events = writer.begin(self._options.n) + events
                    if events:
                        yield events
            if self.form.include_usage and self._record.usage is not None:
                yield writer.usage(self._record.usage)
            yield DONE
        except ApiError as error:
            self._record.error = error.code or error.type
            if not begun:
                raise
            yield error_event(error)
        finally:
            if outputs is not None:
                self._record.outputs = outputs.texts

    async def body(self) -> bytes:
        """The one-body answer.  Raises ``ApiError``."""
        collector = Collector(self._options.n)
        try:
            async with aclosing(self._counted()) as updates:
                async for update in updates:
                    collector.add(update.deltas)
        finally:
            if self._keep_outputs:
                self._record.outputs = collector.texts
        return collector.body(
            self.head,
            self._record.usage or Usage(0),
            logprobs=self._options.logprobs is not None,
            metadata=self.form.metadata,
        )

    async def _counted(self) -> AsyncGenerator[Update, None]:
        """The engine's updates, counted into the record as they pass."""
        record, usage = self._record, self._record.usage or Usage(0)
        record.finish_reasons = [None] * self._options.n
        async with aclosing(self._start(self.head.id)) as updates:
            async for update in updates:
                if record.first_token_s is None:
                    record.first_token_s = self._elapsed()
                    usage.cached_tokens = update.cached_tokens
                for delta in update.deltas:
                    usage.completion_tokens += delta.num_tokens
                    if delta.finish_reason is not None:
                        record.finish_reasons[delta.index] = delta.finish_reason
                yield update


def _notes(
    ignored: list[str], request: ChatCompletionRequest, options: SamplingOptions
) -> dict[str, str]:
    """Response headers that say what was not done as asked."""
    notes = {}
    if ignored:
        notes[IGNORED_HEADER] = _printable(ignored)
    asked = request.max_completion_tokens or request.max_tokens
    if asked is not None and asked > options.max_tokens:
        notes[MAX_TOKENS_HEADER] = str(options.max_tokens)
    return notes


def _printable(names: list[str]) -> str:
    """A field name can be anything; a header value cannot."""
    short = [name[:64].encode("ascii", "replace").decode() for name in names]
    return ", ".join(re.sub(r"[^ -~]", "?", name) for name in short)


def _logged(options: SamplingOptions, form: ReplyForm) -> dict[str, object]:
    """The parameters in the log: those that differ from the defaults.  Stop strings and biases
    may hold what a user said: only their number is told."""
    defaults = asdict(SamplingOptions(max_tokens=0))
    logged: dict[str, object] = {
        name: len(value) if name in ("stop", "logit_bias", "stop_token_ids") else value
        for name, value in asdict(options).items()
        if value != defaults[name] and name != "stream_interval"
    }
    return logged | ({"stream": True} if form.stream else {})
