"""What a server can offer beside ASGI: the client's connection itself, without tasks.

ASGI tells of a lost client only to a task that waits for it, and takes a body's pieces only from
one that awaits.  A server that offers a ``Connection`` (ours does: ``http_protocol``) calls
instead.  Everything works without one, at a higher price.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from ochat_serve.errors import ApiError

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

    @property
    def refusal(self) -> ApiError | None:
        """What the request was answered with, beside the app, before its body had come whole."""
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


class until_disconnect:  # noqa: N801 - used like a function
    """Run a block for as long as the client stays; raise ``ClientDisconnect`` when it leaves, or
    has left already.

    The block is cancelled exactly once, so that what it awaits while cleaning up (telling the
    engine) is not cancelled too.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._connection = connection_of(scope)
        self._receive = receive
        self._task: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._gone = False

    async def __aenter__(self) -> None:
        if self._connection is not None:
            self._connection.on_lost(self._leave)
            if self._gone:
                raise ClientDisconnect
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        if self._connection is None:
            self._watcher = asyncio.create_task(self._watch())

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._connection is not None:
            self._connection.on_lost(None)
        if self._watcher is not None:
            self._watcher.cancel()
        if kind is asyncio.CancelledError and self._gone and self._uncancel() == 0:
            raise ClientDisconnect from None

    def _uncancel(self) -> int:
        """How many others have cancelled the task."""
        assert self._task is not None
        return self._task.uncancel()

    def _leave(self) -> None:
        self._gone = True
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._leave()
