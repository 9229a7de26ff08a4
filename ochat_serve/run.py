"""One request from its admission to its end: its place, its time, its counts.

Whatever ends it, ``__aexit__`` is where the engine is told, the place is given back and the
counts stand in the record.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, Self

from ochat_serve.admission import Admission
from ochat_serve.caller import Caller
from ochat_serve.errors import ApiError, DeadlineExceeded, Unavailable
from ochat_serve.generation import Generation, Update, Usage
from ochat_serve.limits import Limits, Reservation
from ochat_serve.request_log import RequestRecord
from ochat_serve.streaming import FirstSpaces

QUEUE_RETRY_S = 5


class Failable(Protocol):
    """What can be told to fail while it runs or waits."""

    def fail(self, error: ApiError) -> None: ...


class RunningChats:
    """Every chat that is under way."""

    def __init__(self) -> None:
        self._chats: set[Failable] = set()
        self._error: ApiError | None = None

    def __len__(self) -> int:
        return len(self._chats)

    def add(self, chat: Failable) -> None:
        """Raises what all were given up with: whoever comes late is no exception."""
        if self._error is not None:
            raise self._error.with_traceback(None)
        self._chats.add(chat)

    def discard(self, chat: Failable) -> None:
        self._chats.discard(chat)

    def fail(self, error: ApiError) -> None:
        """Give all of them up, for good: each ends as if its generation had failed with
        ``error``."""
        self._error = error
        for chat in list(self._chats):
            chat.fail(error)


@dataclass(frozen=True, slots=True)
class Terms:
    """On which a request runs: who asks, for how many ``choices`` of ``max_tokens`` at most, how
    many ``places`` they take in the engine (equal ones are made once), and how long it may take,
    in seconds since ``elapsed`` was 0."""

    caller: Caller
    choices: int
    places: int
    max_tokens: int
    queue_timeout_s: float
    timeout_s: float
    elapsed: Callable[[], float]


def _nobody_listens() -> None:
    pass


class Run:
    """``generation.Generation``, under way within the context, counted into the record.

    Entering raises ``ApiError``; while it waits for its place it has nothing to take.
    """

    def __init__(
        self,
        context: AbstractAsyncContextManager[Generation],
        terms: Terms,
        record: RequestRecord,
        spaces: FirstSpaces | None,
        admission: Admission,
        limits: Limits,
        running: RunningChats,
    ) -> None:
        self.record = record
        self.usage = record.usage = record.usage or Usage(0)
        self._context = context
        self._terms = terms
        self._spaces = spaces
        self._admission = admission
        self._limits = limits
        self._running = running
        self._reservation: Reservation | None = None
        self._generation: Generation | None = None
        self._starting: asyncio.Task[None] | None = None
        self._queue_timer: asyncio.TimerHandle | None = None
        self._failure: Exception | None = None
        self._ready: Callable[[], None] = _nobody_listens

    async def __aenter__(self) -> Self:
        terms = self._terms
        try:
            if terms.caller.is_limited:
                self._reservation = await self._reserve(terms)
            await self._enter(terms)
        except BaseException:
            self.record.usage = None  # nothing was used
            await self._settle()
            raise
        return self

    async def _reserve(self, terms: Terms) -> Reservation:
        most = self.usage.prompt_tokens + terms.choices * terms.max_tokens
        reservation, headers = await self._limits.reserve(terms.caller, most)
        self.record.headers.update(headers)
        return reservation

    async def _settle(self) -> None:
        if self._reservation is not None:
            used = self.record.usage
            tokens = used.prompt_tokens + used.completion_tokens if used else 0
            await self._limits.settle(self._reservation, tokens)

    async def _enter(self, terms: Terms) -> None:
        left_s = terms.timeout_s - terms.elapsed()
        if left_s <= 0:  # encoding its prompt took so long
            raise self._expired()
        self._running.add(self)
        try:
            self._ticket = self._admission.enter(
                terms.caller.name, self.usage.prompt_tokens, terms.places
            )
        except ApiError:
            self._running.discard(self)
            raise
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(left_s, self._expire)
        if self._ticket.admitted:
            try:
                self._generation = await self._context.__aenter__()
            except BaseException:
                self._leave()
                raise
        else:
            self._queue_timer = loop.call_later(terms.queue_timeout_s, self._expire_in_queue)
            self._ticket.on_admitted = self._start_soon
            self._ticket.on_refused = self.fail

    async def __aexit__(self, *error: Any) -> None:
        self._ready = _nobody_listens
        try:
            if self._starting is not None and not self._starting.done():
                self._starting.cancel()
                await asyncio.wait((self._starting,))
            if self._generation is not None:
                self._count_unread()
                await self._context.__aexit__(*error)
        finally:
            self._leave()
            await self._settle()

    def _count_unread(self) -> None:
        """What a client that has left did not read was generated, too."""
        assert self._generation is not None
        if not self._generation.finished:
            with suppress(ApiError):
                self._next(self._generation)

    def _leave(self) -> None:
        self._timer.cancel()
        if self._queue_timer is not None:
            self._queue_timer.cancel()
        self._running.discard(self)
        if self._generation is None:
            self.record.usage = None
        self._admission.leave(self._ticket, self.usage.completion_tokens)

    def _start_soon(self) -> None:
        assert self._queue_timer is not None
        self._queue_timer.cancel()
        self.record.queue_s = self._terms.elapsed()
        self._starting = asyncio.create_task(self._start())

    async def _start(self) -> None:
        if self._failure is not None:  # between its admission and now
            return
        try:
            self._generation = await self._context.__aenter__()
        except Exception as error:  # noqa: BLE001 - raised again by ``take``, in the request's task
            self.fail(error)
        else:
            self._generation.listen(self._ready)

    def _expire_in_queue(self) -> None:
        self.fail(
            Unavailable(
                f"The request waited {self._terms.queue_timeout_s:g} seconds for the engine. "
                "Please try again later.",
                code="queue_timeout",
                retry_after_s=QUEUE_RETRY_S,
            )
        )

    def _expire(self) -> None:
        self.fail(self._expired())

    def _expired(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"The request took longer than {self._terms.timeout_s:g} seconds.")

    def fail(self, error: Exception) -> None:
        """Have ``take`` raise ``error`` from now on; whoever listens is called.  The first error
        counts, and after the last update none does."""
        if self._failure is not None or self.finished:
            return
        self._failure = error
        if isinstance(error, ApiError):
            # Here, not where it is raised: the client may never come to read it.
            self.record.error = error.code or error.type
        if not self._ticket.admitted:
            self._admission.leave(self._ticket, 0)  # it must not reach the engine any more
        self._ready()

    def listen(self, ready: Callable[[], None]) -> None:
        self._ready = ready
        if self._generation is not None:
            self._generation.listen(ready)
        if self._failure is not None:
            ready()

    @property
    def finished(self) -> bool:
        return self._generation is not None and self._generation.finished

    @property
    def failed(self) -> bool:
        """Whether ``take`` raises."""
        return self._failure is not None

    def take(self) -> Update | None:
        if self._failure is not None:
            raise self._failure.with_traceback(None)  # one error may be many chats'
        return None if self._generation is None else self._next(self._generation)

    def _next(self, generation: Generation) -> Update | None:
        update = generation.take()
        if update is None:
            return None
        if self.record.first_token_s is None:
            self._first(update)
        if self._spaces is not None:
            self._spaces.remove(update)
        for delta in update.deltas:
            self.usage.completion_tokens += delta.num_tokens
            if delta.finish_reason is not None:
                self.record.finish_reasons[delta.index] = delta.finish_reason
        return update

    def _first(self, update: Update) -> None:
        self.record.first_token_s = self._terms.elapsed()
        self.usage.cached_tokens = update.cached_tokens
        self._admission.prefilled(self._ticket)
