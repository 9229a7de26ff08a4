"""The life of one chat from its start in the engine to its last byte.

What fails before the first update still has an HTTP status; what fails later becomes an error
event in the stream.
"""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, Self

from ochat_serve.chat_request import ReplyForm
from ochat_serve.errors import ApiError
from ochat_serve.generation import Delta, Generation, SamplingOptions, Usage
from ochat_serve.request_log import RequestRecord
from ochat_serve.run import Run
from ochat_serve.streaming import (
    DONE,
    Collector,
    EventWriter,
    FirstSpaces,
    ReplyHead,
    error_event,
)


class Writer(Protocol):
    """What writes the events of a stream: ``streaming.EventWriter`` or its like."""

    def begin(self, choices: int) -> bytes: ...

    def deltas(self, deltas: Iterable[Delta]) -> bytes: ...

    def usage(self, usage: Usage) -> bytes: ...


class Body(Protocol):
    """What gathers a whole answer: ``streaming.Collector`` or its like."""

    @property
    def texts(self) -> list[str]: ...

    def add(self, deltas: Iterable[Delta]) -> None: ...

    def body(
        self, head: ReplyHead, usage: Usage, *, logprobs: bool, metadata: dict[str, str] | None
    ) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Wire:
    """The shapes of one endpoint."""

    writer: Callable[..., Writer]  # of a head, with usage, logprobs and obfuscation
    body: Callable[[int], Body]  # of so many choices


CHAT = Wire(EventWriter, Collector)

# request id -> the generation, within a context
Generate = Callable[[str], AbstractAsyncContextManager[Generation]]
# with context, record and spaces
StartRun = Callable[..., Run]


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
        run: StartRun,
        drops_first_space: bool,
        keep_outputs: bool,
        choices: int | None = None,
        wire: Wire = CHAT,
    ) -> None:
        """``choices`` is their number, where it is not ``options.n``."""
        self.head = head
        self.form = form
        self.headers: dict[str, str] = {}
        self._options = options
        self._record = record
        self._generate = generate
        self._start_run = run
        self._drops_first_space = drops_first_space
        self._keep_outputs = keep_outputs
        self._choices = choices or options.n
        self._wire = wire

    def stream(self) -> "ChatStream":
        """The answer as events."""
        writer = self._wire.writer(
            self.head,
            usage=self.form.include_usage,
            logprobs=self._options.logprobs is not None,
            obfuscation=self.form.include_obfuscation,
        )
        outputs = self._wire.body(self._choices) if self._keep_outputs else None
        return ChatStream(self._run(), writer, outputs, self.form, self._choices)

    async def body(self) -> bytes:
        """The one-body answer.  Raises ``ApiError``."""
        collector = self._wire.body(self._choices)
        try:
            async with self._run() as source:
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

    def _run(self) -> Run:
        self._record.finish_reasons = [None] * self._choices
        spaces = FirstSpaces() if self._drops_first_space else None
        return self._start_run(
            context=self._generate(self.head.id), record=self._record, spaces=spaces
        )


class ChatStream:
    """A stream, under way within the context: ``take`` whenever the listener was called, until
    ``finished``.  Entering raises ``ApiError``."""

    def __init__(
        self,
        source: Run,
        writer: Writer,
        outputs: Body | None,
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

    @property
    def failed(self) -> bool:
        return self._source.failed

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
