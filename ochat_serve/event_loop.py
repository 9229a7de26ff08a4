"""uvloop's event loop, with TLS that waits for nobody and has a place for everybody it lets in."""

import asyncio
from collections.abc import Callable
from functools import partial
from ssl import SSLContext
from typing import Any, Protocol

import uvloop

# What uvloop itself makes for each connection of a server with TLS; its stubs do not know it.
from uvloop.loop import SSLProtocol  # type: ignore[attr-defined]

from ochat_serve.http_bounds import drop

# uvicorn hands neither of them on.  Without them a client that says nothing would hold a
# connection for a minute, and one that does not say goodbye would hold up the server's end for
# half of one: clients with idle connections do not read.
TLS_TIMEOUTS_S = {"ssl_handshake_timeout": 10, "ssl_shutdown_timeout": 3}


class Placed(Protocol):
    """A protocol whose connections are counted; ``http_protocol.HttpProtocol``."""

    transport: asyncio.Transport | None

    def enter(self, transport: asyncio.BaseTransport) -> bool:
        """Take a place for the connection before it is made.  Whether there is one."""
        ...

    def leave(self) -> None: ...


class EventLoop(uvloop.Loop):
    """For ``uvicorn.Config(loop=...)``."""

    async def create_server(self, *args: Any, **options: Any) -> Any:
        factory, *where = args
        context = options.pop("ssl", None)
        if context is not None:
            factory = partial(TlsDoor, self, context, factory)
        return await super().create_server(factory, *where, **options)


class TlsDoor(asyncio.Protocol):
    """Stands in front of TLS: who finds no place is gone before a handshake, which costs a
    millisecond and may take seconds.  uvloop's own way there calls nobody before it is over."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, context: SSLContext, factory: Callable[[], Placed]
    ) -> None:
        self._loop = loop
        self._context = context
        self._factory = factory

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        protocol = self._factory()
        if not protocol.enter(transport):
            drop(transport)
            return
        handshake = self._loop.create_future()
        tls = SSLProtocol(
            self._loop, protocol, self._context, handshake, server_side=True, **TLS_TIMEOUTS_S
        )
        handshake.add_done_callback(lambda done: _leave_unless_made(done, protocol))
        transport.set_protocol(tls)
        tls.connection_made(transport)


def _leave_unless_made(handshake: asyncio.Future[None], protocol: Placed) -> None:
    """A client that hangs up in the middle is no exception."""
    if handshake.exception() is not None or protocol.transport is None:
        protocol.leave()
