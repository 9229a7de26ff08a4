"""Server-sent events over ASGI: written as tokens come, by one loop over all open streams.

A stream begins as any ASGI response does.  Where the server offers its ``Connection``, all
further events are written from that one loop, without waking a task per token; elsewhere the
stream's own task sends them.
"""

import asyncio
import heapq
import itertools
import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from fastapi import Response
from starlette.types import Receive, Scope, Send

from ochat_serve.errors import ApiError
from ochat_serve.routes.connection import Connection, connection_of, until_disconnect
from ochat_serve.streaming import PING, error_event

MAX_GAP_S = 0.05
# At this rate, writing takes less than a tenth of a core; one token an event is cheap up to it.
EVENTS_PER_S = 5_000
# Of a gap: who is nearly due goes along, so that one turn of the loop writes to many.
_EARLY = 0.1
_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx: pass every event on at once
}


class Events(Protocol):
    """What is streamed: whole events, taken whenever the listener was called."""

    @property
    def finished(self) -> bool: ...

    @property
    def failed(self) -> bool:
        """Whether nothing more will come than word of a failure."""
        ...

    def listen(self, ready: Callable[[], None]) -> None: ...

    def take(self) -> bytes:
        """Raises ``ApiError`` while the answer has not begun."""
        ...


class OpenStreams:
    """Every open stream: one loop writes to all that have news, one keeps the silent alive.

    With ``merges``, tokens of many streams are merged (by the engine, while nobody takes them)
    so that all together write about ``EVENTS_PER_S`` events; but every stream that has news
    writes at least every ``MAX_GAP_S``.
    """

    def __init__(
        self, interval_s: float, clock: Callable[[], float], *, merges: bool = False
    ) -> None:
        self.clock = clock
        self._interval_s = interval_s
        self._events_per_s = EVENTS_PER_S if merges else math.inf
        self._streams: set[EventStream] = set()
        self._ready: list[EventStream] = []
        # (when to write, a number that decides between equals, stream), the earliest first
        self._held: list[tuple[float, int, EventStream]] = []
        self._numbers = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0

    def add(self, stream: "EventStream") -> None:
        self._streams.add(stream)

    def discard(self, stream: "EventStream") -> None:
        self._streams.discard(stream)

    @property
    def gap_s(self) -> float:
        """Seconds between the events of one stream, if it has news all the time."""
        return min(MAX_GAP_S, len(self._streams) / self._events_per_s)

    def ready(self, stream: "EventStream") -> None:
        """``stream`` has something to write: it will, with all others, in the loop's next turn
        or when its gap is over."""
        if not self._ready:
            asyncio.get_running_loop().call_soon(self._flush)
        self._ready.append(stream)

    def _flush(self) -> None:
        ready, self._ready = self._ready, []
        now, gap = self.clock(), self.gap_s
        for stream in ready:
            due = stream.last_sent + gap
            if due - gap * _EARLY <= now:
                stream.flush(now)
            else:
                heapq.heappush(self._held, (due, next(self._numbers), stream))
        self._set_timer(now)

    def _set_timer(self, now: float) -> None:
        """For the earliest of the held."""
        if not self._held:
            return
        due = self._held[0][0]
        if self._timer is not None:
            if self._timer_due <= due:
                return
            self._timer.cancel()
        self._timer_due = due
        delay = max(0.0, due - now)
        self._timer = asyncio.get_running_loop().call_later(delay, self._release)

    def _release(self) -> None:
        self._timer = None
        now = self.clock()
        soon = now + self.gap_s * _EARLY
        while self._held and self._held[0][0] <= soon:
            heapq.heappop(self._held)[2].flush(now)
        self._set_timer(now)

    async def keep_alive(self) -> None:
        """Runs as long as the app."""
        while True:
            await asyncio.sleep(self._interval_s / 4)
            silent_since = self.clock() - self._interval_s
            for stream in list(self._streams):
                if stream.last_sent <= silent_since:
                    stream.ping()


class EventStream(Response):
    """An ASGI response that sends ``events`` as they come.

    The status line waits for the first event (or the first ping), so that an error before it
    still is an HTTP status.
    """

    def __init__(
        self,
        events: AbstractAsyncContextManager[Events],
        headers: dict[str, str],
        streams: OpenStreams,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({**_HEADERS, **headers})
        self._context = events
        self._streams = streams
        self._started = False
        self._wake = asyncio.Event()
        self._ping_due = False
        self._writer: Connection | None = None
        self.last_sent = streams.clock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = connection_of(scope)
        self._streams.add(self)
        try:
            # The client's leaving must not cut short how the context is left, and the last bytes
            # come after it: who has read them may ask again, and a slow reader holds no place.
            async with self._context as events:
                self._events = events
                async with until_disconnect(scope, receive):
                    last = await self._all_but_the_last(send, connection)
            async with until_disconnect(scope, receive):
                await self._send(send, last, more=False)
        finally:
            self._streams.discard(self)

    async def _all_but_the_last(self, send: Send, connection: Connection | None) -> bytes:
        """The last events.  Raises ``ApiError`` where nothing was sent."""
        try:
            last = await self._begin(send, connection)
            return last if self._writer is None else await self._written_by_loop(self._writer)
        except ApiError as error:
            if not self._started:
                raise
            return error_event(error)

    async def _begin(self, send: Send, connection: Connection | None) -> bytes:
        """Send what comes, up to where the loop takes over or to the end.  The last events."""
        self._events.listen(self._wake.set)
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._ping_due:
                self._ping_due = False
                await self._send(send, PING)
            data = self._events.take()
            if self._events.finished:
                return data
            if data and connection is not None and connection.chunked:
                await self._start(send)
                connection.write(data)
                self.last_sent = self._streams.clock()
                self._writer = connection
                return b""
            if data:
                await self._send(send, data)

    async def _written_by_loop(self, writer: Connection) -> bytes:
        """The last events; all others are written by ``flush``."""
        self._last: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        writer.on_resume(self._on_ready)
        self._events.listen(self._on_ready)
        try:
            return await self._last
        finally:  # whatever is written later would come after the end
            writer.on_resume(None)
            self._writer = None

    def _on_ready(self) -> None:
        self._streams.ready(self)

    def flush(self, now: float) -> None:
        """Write what has come, unless the client is slow: then it is merged until it reads."""
        writer = self._writer
        if writer is None or self._last.done() or (writer.paused and not self._events.failed):
            return
        try:
            data = self._events.take()
        except Exception as error:  # noqa: BLE001 - raised again in the stream's own task
            self._last.set_exception(error)
            return
        if self._events.finished:
            self._last.set_result(data)
        elif data:
            writer.write(data)
            self.last_sent = now

    def ping(self) -> None:
        """Send a comment line, unless the client is slow: then it has enough to read."""
        if self._writer is None:
            self._ping_due = True
            self._wake.set()
        elif not self._writer.paused:
            self._writer.write(PING)
            self.last_sent = self._streams.clock()

    async def _start(self, send: Send) -> None:
        if not self._started:
            self._started = True
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        await self._start(send)
        await send({"type": "http.response.body", "body": data, "more_body": more})
        self.last_sent = self._streams.clock()
