"""The life of one chat from its start in the engine to its last byte.

What fails before the first update still has an HTTP status; what fails later becomes an error
event in the stream.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, Self

from ochat_serve.chat_request import ReplyForm
from ochat_serve.errors import ApiError
from ochat_serve.generation import Generation, SamplingOptions, Update, Usage
from ochat_serve.request_log import RequestRecord
from ochat_serve.streaming import (
    DONE,
    Collector,
    EventWriter,
    FirstSpaces,
    ReplyHead,
    error_event,
)

# request id -> the generation, within a context
Generate = Callable[[str], AbstractAsyncContextManager[Generation]]


class Chat:
    """One request on its way: enter ``stream()`` or await ``body()``, once."""

    def __init__(
        self,
        *,
        head: ReplyHead,
        form: ReplyForm,
        options: SamplingOptions,
        record: RequestRecord,
        generate: Generate,
        drops_first_space: bool,
        elapsed: Callable[[], float],
        keep_outputs: bool,
    ) -> None:
        self.head = head
        self.form = form
        self.headers: dict[str, str] = {}
        self._options = options
        self._record = record
        self._generate = generate
        self._drops_first_space = drops_first_space
        self._elapsed = elapsed
        self._keep_outputs = keep_outputs

    def stream(self) -> "ChatStream":
        """The answer as events."""
        writer = EventWriter(
            self.head,
            usage=self.form.include_usage,
            logprobs=self._options.logprobs is not None,
            obfuscation=self.form.include_obfuscation,
        )
        outputs = Collector(self._options.n) if self._keep_outputs else None
        return ChatStream(self._counted(), writer, outputs, self.form, self._options.n)

    async def body(self) -> bytes:
        """The one-body answer.  Raises ``ApiError``."""
        collector = Collector(self._options.n)
        try:
            async with self._counted() as source:
                ready = asyncio.Event()
                source.listen(ready.set)
                while not source.finished:
                    await ready.wait()
                    ready.clear()
                    if (update := source.take()) is not None:
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

    def _counted(self) -> "_Counted":
        self._record.finish_reasons = [None] * self._options.n
        spaces = FirstSpaces() if self._drops_first_space else None
        return _Counted(self._generate(self.head.id), spaces, self._record, self._elapsed)


class _Counted:
    """A generation whose updates are counted into the record as they pass; it runs within the
    context."""

    def __init__(
        self,
        context: AbstractAsyncContextManager[Generation],
        spaces: FirstSpaces | None,
        record: RequestRecord,
        elapsed: Callable[[], float],
    ) -> None:
        self.record = record
        self.usage = record.usage = record.usage or Usage(0)
        self._context = context
        self._spaces = spaces
        self._elapsed = elapsed

    async def __aenter__(self) -> Self:
        self._generation = await self._context.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        try:
            if not self._generation.finished:
                # What a client that has left did not read was generated, too: it counts.
                with suppress(ApiError):
                    self.take()
        finally:
            await self._context.__aexit__(*error)

    def listen(self, ready: Callable[[], None]) -> None:
        self._generation.listen(ready)

    @property
    def finished(self) -> bool:
        return self._generation.finished

    def take(self) -> Update | None:
        update = self._generation.take()
        if update is None:
            return None
        if self.record.first_token_s is None:
            self.record.first_token_s = self._elapsed()
            self.usage.cached_tokens = update.cached_tokens
        if self._spaces is not None:
            self._spaces.remove(update)
        for delta in update.deltas:
            self.usage.completion_tokens += delta.num_tokens
            if delta.finish_reason is not None:
                self.record.finish_reasons[delta.index] = delta.finish_reason
        return update


class ChatStream:
    """A stream, under way within the context: ``take`` whenever the listener was called, until
    ``finished``.  Entering raises ``ApiError``."""

    def __init__(
        self,
        source: _Counted,
        writer: EventWriter,
        outputs: Collector | None,
        form: ReplyForm,
        choices: int,
    ) -> None:
        self.finished = False
        self.listen = source.listen
        self._source = source
        self._writer = writer
        self._outputs = outputs
        self._include_usage = form.include_usage
        self._choices = choices
        self._begun = False

    async def __aenter__(self) -> Self:
        await self._source.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self._source.__aexit__(*error)
        finally:
            if self._outputs is not None:
                self._source.record.outputs = self._outputs.texts

    def take(self) -> bytes:
        """Whole events for all that has come; b"" where there is nothing to show yet.

        Raises ``ApiError`` before the first events; later errors are events.
        """
        try:
            update = self._source.take()
        except ApiError as error:
            self._source.record.error = error.code or error.type
            if not self._begun:
                raise
            self.finished = True
            return error_event(error)
        if update is None:
            return b""
        if self._outputs is not None:
            self._outputs.add(update.deltas)
        events = self._writer.deltas(update.deltas)
        if not self._begun:
            self._begun = True
            events = self._writer.begin(self._choices) + events
        if self._source.finished:
            self.finished = True
            events += self._ending()
        return events

    def _ending(self) -> bytes:
        return (self._writer.usage(self._source.usage) if self._include_usage else b"") + DONE
