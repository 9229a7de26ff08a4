"""uvicorn's HTTP protocol on h11, with OpenAI's body where bytes are no HTTP, and a short road
for the bodies of event streams.

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
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from ochat_serve.errors import InvalidRequest
from ochat_serve.routes.event_stream import BODY_WRITER


class HttpProtocol(H11Protocol):
    """For ``uvicorn.Config(http=...)``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._application = self.app
        self.app = self._with_writer
        self.resumed: Callable[[], None] | None = None

    async def _with_writer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, with a ``BodyWriter`` where the client understands chunks."""
        self.resumed = None
        version = self.conn.their_http_version
        if version is not None and version >= b"1.1":
            scope["extensions"] = {BODY_WRITER: ChunkWriter(self, self.cycle)}
        await self._application(scope, receive, send)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.resumed is not None:
            self.resumed()

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


class ChunkWriter:
    """``routes.event_stream.BodyWriter``: chunks straight into the transport.

    For a response that has begun without a length.  A chunk in the middle of a body does not
    change h11's state, so it need not pass through it; the last one does, by ASGI.
    """

    def __init__(self, protocol: HttpProtocol, cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self._cycle = cycle
        self._flow = protocol.flow
        self._transport: asyncio.Transport = protocol.transport

    @property
    def paused(self) -> bool:
        return self._flow.write_paused

    def on_resume(self, resumed: Callable[[], None]) -> None:
        self._protocol.resumed = resumed

    def write(self, data: bytes) -> None:
        if not self._cycle.disconnected:
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
