"""What a server can offer beside ASGI: the client's connection itself, without tasks.

ASGI tells of a lost client only to a task that waits for it, and takes a body's pieces only from
one that awaits.  A server that offers a ``Connection`` (ours does: ``http_protocol``) calls
instead.  Everything works without one, at a higher price.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

# The key in an ASGI scope's "extensions".
CONNECTION = "ochat_serve.connection"


class Connection(Protocol):
    """For one request.  After the client has left, writing does nothing."""

    @property
    def paused(self) -> bool:
        """Whether the client reads too slowly to be sent more."""
        ...

    @property
    def chunked(self) -> bool:
        """Whether ``write`` may be used once the response has begun."""
        ...

    def on_resume(self, resumed: Callable[[], None] | None) -> None:
        """Have ``resumed`` called when ``paused`` has become false again."""
        ...

    def on_lost(self, lost: Callable[[], None] | None) -> None:
        """Have ``lost`` called when the client leaves; at once if it has."""
        ...

    def write(self, data: bytes) -> None:
        """Send a piece of the body of a response that has begun; at least one byte."""
        ...


def connection_of(scope: Scope) -> Connection | None:
    found: Connection | None = scope.get("extensions", {}).get(CONNECTION)
    return found


@asynccontextmanager
async def until_disconnect(scope: Scope, receive: Receive) -> AsyncGenerator[None, None]:
    """Run the block for as long as the client stays; raise ``ClientDisconnect`` when it leaves.

    The block is cancelled exactly once, so that what it awaits while cleaning up (telling the
    engine) is not cancelled too.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    def leave() -> None:
        nonlocal gone
        gone = True
        task.cancel()

    connection = connection_of(scope)
    watcher = None if connection else asyncio.create_task(_watch(receive, leave))
    if connection is not None:
        connection.on_lost(leave)
    try:
        yield
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        if connection is not None:
            connection.on_lost(None)
        if watcher is not None:
            watcher.cancel()


async def _watch(receive: Receive, leave: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    leave()
