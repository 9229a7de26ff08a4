"""Server-sent events over ASGI, with a comment line where the model is silent for long."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from fastapi import Response
from starlette.types import Receive, Scope, Send

from ochat_serve.errors import ApiError
from ochat_serve.routes.replies import until_disconnect
from ochat_serve.streaming import PING, error_event

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx: pass every event on at once
}


class OpenStreams:
    """Every open stream, and one task that keeps the silent ones alive."""

    def __init__(self, interval_s: float, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._interval_s = interval_s
        self._streams: set[EventStream] = set()

    def add(self, stream: "EventStream") -> None:
        self._streams.add(stream)

    def discard(self, stream: "EventStream") -> None:
        self._streams.discard(stream)

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
        self, events: AsyncGenerator[bytes, None], headers: dict[str, str], streams: OpenStreams
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({**_HEADERS, **headers})
        self._events = events
        self._streams = streams
        self._started = False
        self._sending = False
        self._ping: asyncio.Task[None] | None = None
        self.last_sent = streams.clock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send_asgi = send
        self._streams.add(self)
        try:
            async with until_disconnect(receive), aclosing(self._events) as events:
                await self._run(events)
        finally:
            self._streams.discard(self)
            if self._ping is not None:
                self._ping.cancel()

    async def _run(self, events: AsyncGenerator[bytes, None]) -> None:
        try:
            async for data in events:
                if self._ping is not None:
                    await self._ping
                await self._send(data)
        except ApiError as error:
            if not self._started:
                raise
            await self._send(error_event(error))
        await self._send_asgi({"type": "http.response.body", "body": b"", "more_body": False})

    def ping(self) -> None:
        """Send a comment line, unless something is being sent already."""
        if not self._sending and self._ping is None:
            self._ping = asyncio.create_task(self._send(PING))
            self._ping.add_done_callback(self._ping_done)

    def _ping_done(self, task: "asyncio.Task[None]") -> None:
        self._ping = None

    async def _send(self, data: bytes) -> None:
        self._sending = True
        if not self._started:
            self._started = True
            await self._send_asgi(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
        await self._send_asgi({"type": "http.response.body", "body": data, "more_body": True})
        self.last_sent = self._streams.clock()
        self._sending = False
