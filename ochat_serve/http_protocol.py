"""uvicorn's HTTP protocol on h11, with OpenAI's body where bytes are no HTTP, and the
connection itself for event streams.

h11 rather than httptools: with httptools a body is lost after ``Upgrade: h2c`` (curl --http2,
Java's client), a pipelined request keeps an abandoned one running, headers have no bound, and
bad bytes are answered inside a running stream.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from ochat_serve.errors import InvalidRequest
from ochat_serve.routes.connection import CONNECTION


class HttpProtocol(H11Protocol):
    """For ``uvicorn.Config(http=...)``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._application = self.app
        self.app = self._with_connection
        self.resumed: Callable[[], None] | None = None
        self.lost: Callable[[], None] | None = None

    async def _with_connection(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.resumed = self.lost = None
        scope["extensions"] = {CONNECTION: H11Connection(self, self.cycle)}
        await self._application(scope, receive, send)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.scheme == "https":  # TLS holds eight times as much for a slow reader
            transport.set_write_buffer_limits(high=HIGH_WATER_LIMIT)

    def handle_events(self) -> None:
        super().handle_events()
        # The next request came early.  It waits its turn, but while somebody wants to know
        # whether the client stays, there must be reading: up to a bound.
        early = self.conn.their_state is h11.DONE and self.flow.read_paused
        if early and self.lost is not None and len(self.conn.trailing_data[0]) < HIGH_WATER_LIMIT:
            self.flow.resume_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.resumed is not None:
            self.resumed()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.lost is not None:
            self.lost()

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(InvalidRequest(f"This is not HTTP as expected: {msg}").body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class H11Connection:
    """``routes.connection.Connection``.

    A chunk in the middle of a body does not change h11's state, so it goes straight into the
    transport; the last one passes through h11, by ASGI.
    """

    def __init__(self, protocol: HttpProtocol, cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self._cycle = cycle
        self._flow = protocol.flow
        self._transport: asyncio.Transport = protocol.transport

    @property
    def paused(self) -> bool:
        return self._flow.write_paused

    @property
    def chunked(self) -> bool:
        version = self._protocol.conn.their_http_version
        return version is not None and version >= b"1.1"

    def on_resume(self, resumed: Callable[[], None] | None) -> None:
        self._protocol.resumed = resumed

    def on_lost(self, lost: Callable[[], None] | None) -> None:
        self._protocol.lost = lost
        if lost is not None:
            if self._cycle.disconnected:
                lost()
            self._flow.resume_reading()  # a client that leaves is seen by reading only

    def write(self, data: bytes) -> None:
        if not self._cycle.disconnected:
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
