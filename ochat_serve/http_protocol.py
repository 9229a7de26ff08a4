"""uvicorn's HTTP protocol on h11, with OpenAI's body where bytes are no HTTP, and the
connection itself for event streams.

h11 rather than httptools: with httptools a body is lost after ``Upgrade: h2c`` (curl --http2,
Java's client), a pipelined request keeps an abandoned one running, headers have no bound, and
bad bytes are answered inside a running stream.
"""

import asyncio
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from ochat_serve.errors import (
    ApiError,
    HeadersTooLarge,
    InvalidRequest,
    RequestTimeout,
    Unavailable,
)
from ochat_serve.http_bounds import (
    MAX_HEAD_BYTES,
    MAX_PIPELINED_BYTES,
    MIN_READ_BYTES_PER_S,
    BoundedConnection,
    Bounds,
    Deadline,
    Refused,
    drop,
    hold_little,
)
from ochat_serve.http_places import Places
from ochat_serve.http_refusals import CorsHeaders, no_cors, response
from ochat_serve.routes.connection import CONNECTION

# Whatever comes at once is read in such pieces, so that h11's bound on what is incomplete holds
# for the headers after a body, too.
_PIECE = 16 * 1024
_TOO_LARGE = (
    f"The request line and headers have more bytes than this server takes ({MAX_HEAD_BYTES})."
)
# uvicorn warns of every request that is no HTTP: lines that anybody can have written.  Below its
# own loggers levels are set anew with every configuration.
_quiet = logging.getLogger(__name__)
_quiet.setLevel(logging.ERROR)


class HttpProtocol(H11Protocol):
    """For ``uvicorn.Config(http=...)``, with bounds by ``HttpProtocol.within(bounds)``."""

    bounds = Bounds()
    places = Places(bounds.max_connections, bounds.gateways)

    cors: CorsHeaders = staticmethod(no_cors)

    @classmethod
    def within(cls, bounds: Bounds, cors: CorsHeaders = no_cors) -> "type[HttpProtocol]":
        places = Places(bounds.max_connections, bounds.gateways)
        own = {"bounds": bounds, "places": places, "cors": staticmethod(cors)}
        return type(cls.__name__, (cls,), own)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = BoundedConnection()
        self.logger = _quiet
        self._application = self.app
        self.app = self._with_connection
        self.refusal: ApiError | None = None
        self._has_place = False
        self._peer: str | None = None
        self._current: H11Connection | None = None  # of the request that came last
        self._sender = Deadline(self.loop)
        self._reader = Deadline(self.loop)
        self._sending: Any = None  # h11's state of the client when its deadline was last looked at
        self._times = {
            h11.IDLE: self.bounds.header_timeout_s,
            h11.SEND_BODY: self.bounds.read_timeout_s,
        }

    async def _with_connection(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._current = H11Connection(self, self.cycle)
        scope["extensions"] = {CONNECTION: self._current}
        await self._application(scope, receive, send)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        hold_little(transport)
        if self.scheme == "https":  # TLS holds eight times as much for a slow reader
            transport.set_write_buffer_limits(high=HIGH_WATER_LIMIT)
        if self.enter(transport):
            self._watch_sender()
        else:
            self._refuse(
                Unavailable(
                    "The server has as many connections as it takes, in all or from your address. "
                    "Please try again in a few seconds.",
                    code="overloaded",
                    retry_after_s=1,
                )
            )

    def enter(self, transport: asyncio.BaseTransport) -> bool:
        """Whether the connection has a place; it has from the first time on."""
        if not self._has_place:
            name = transport.get_extra_info("peername")
            self._peer = str(name[0]) if isinstance(name, tuple) else None
            self._has_place = self.places.enter(self._peer)
        return self._has_place

    def leave(self) -> None:
        if self._has_place:
            self._has_place = False
            self.places.leave(self._peer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._sender.stop()
        self._reader.stop()
        self.leave()
        super().connection_lost(exc)
        if self._current is not None:
            self._current.end()

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), _PIECE):
            if self.transport.is_closing():
                return
            super().data_received(data[start : start + _PIECE])
        self._watch_sender()
        if self._current is not None and self._current.watched and self.flow.read_paused:
            self._keep_reading()

    def _keep_reading(self) -> None:
        """uvicorn stops at a request that came before its turn; but a client that leaves is seen
        by reading only."""
        if len(self.conn.trailing_data[0]) > MAX_PIPELINED_BYTES:
            drop(self.transport)
        else:
            self.flow.resume_reading()

    def _should_upgrade(self) -> bool:
        return False  # nothing here speaks anything else

    # Slow senders

    def _watch_sender(self) -> None:
        """What has begun must end in time: a request's head, then its body."""
        state = self.conn.their_state
        if state is not self._sending:
            self._sending = state
            self._sender.stop()
            if state in self._times:
                self._sender.start(self._times[state], self._too_slow)

    def _too_slow(self) -> None:
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._close()  # nothing was asked
            return
        seconds = self._times[self._sending]
        self._refuse(RequestTimeout(f"The request did not come whole within {seconds:g} seconds."))

    # Slow readers

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        if not self.transport.is_closing():
            self._reader.stop()
        super().resume_writing()
        if self._current is not None:
            self._current.resume()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_reader()
        elif self.conn.their_state is not h11.IDLE:
            self._watch_sender()  # a request that was sent ahead has its turn

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_reader()

    def _watch_reader(self) -> None:
        """What waits to be written must get less in time, by what the slowest reader takes of
        it: also after a polite close, which waits for it."""
        waiting = self.transport.get_write_buffer_size()
        if waiting:
            seconds = self.bounds.write_timeout_s
            left = max(0, waiting - int(seconds * MIN_READ_BYTES_PER_S))
            self._reader.start(seconds, partial(self._unread, left))

    def _unread(self, most: int) -> None:
        if self.transport.get_write_buffer_size() <= most:
            self._watch_reader()
        else:
            drop(self.transport)

    # Answers without the app

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn while it handles h11's error."""
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            given = str(error) if isinstance(error, Refused) else _TOO_LARGE
            self._refuse(HeadersTooLarge(given))
        elif isinstance(error, Refused):
            self._refuse(InvalidRequest(str(error)))
        else:  # h11's own words quote what was sent
            self._refuse(InvalidRequest(f"This is not HTTP as expected: {msg}"))

    def _refuse(self, error: ApiError) -> None:
        """Answer, where no answer has begun; then close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(response(error, self.cors(self._origin())))
            self.refusal = error
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the app must not answer, too
            self.cycle.message_event.set()
        self._close()

    def _origin(self) -> str | None:
        if self.cycle is None or self.cycle.response_complete:
            return None
        given = next((value for name, value in self.headers if name == b"origin"), None)
        return None if given is None else given.decode("latin-1")

    def _close(self) -> None:
        self.transport.close()
        self._watch_reader()


class H11Connection:
    """``routes.connection.Connection``.  Each request has one of its own: while one that was
    answered is cleaned up, the next may be under way on the same connection.

    A chunk in the middle of a body does not change h11's state, so it goes straight into the
    transport; the last one passes through h11, by ASGI.
    """

    def __init__(self, protocol: HttpProtocol, cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self._cycle = cycle
        self._flow = protocol.flow
        self._transport: asyncio.Transport = protocol.transport
        self._resumed: Callable[[], None] | None = None
        self._lost: Callable[[], None] | None = None

    @property
    def paused(self) -> bool:
        return self._flow.write_paused

    @property
    def chunked(self) -> bool:
        version = self._protocol.conn.their_http_version
        return version is not None and version >= b"1.1"

    @property
    def refusal(self) -> ApiError | None:
        return self._protocol.refusal

    @property
    def watched(self) -> bool:
        """Whether somebody wants to know when the client leaves."""
        return self._lost is not None

    def on_resume(self, resumed: Callable[[], None] | None) -> None:
        self._resumed = resumed

    def on_lost(self, lost: Callable[[], None] | None) -> None:
        self._lost = lost
        if lost is not None:
            self.end()
            self._flow.resume_reading()  # a client that leaves is seen by reading only

    def write(self, data: bytes) -> None:
        if not self._cycle.disconnected:
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    # Called by the protocol

    def resume(self) -> None:
        if self._resumed is not None:
            self._resumed()

    def end(self) -> None:
        """The connection may be lost; whoever has the whole answer has not left."""
        if self._lost is not None and self._cycle.disconnected:
            self._lost()
