"""uvicorn's server, ended with care: a first signal drains it, a second one ends it now.

Draining it goes on listening, so that probes and new requests get an answer; it ends when no
request is left or ``drain_s`` is over.  Whatever still runs then is given up with an error.
"""

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from socket import socket
from types import FrameType

import uvicorn

from ochat_serve.cli import say
from ochat_serve.ending import Children
from ochat_serve.serving import Serving
from ochat_serve.tls import Certificate, kept_fresh

# To front ends, whose parent counts the signals: end now.
HURRY = signal.SIGUSR2
# What administrators send to have files read again.
RELOAD = signal.SIGHUP
# For the last bytes of those that were given up, and for clients that are slow to close.
GRACE_S = 5
HURRIED_GRACE_S = 1
CHILDREN_GRACE_S = 3
# From "now" to the end at the latest.
HURRY_S = 5


class HttpServer(uvicorn.Server):
    """``loop`` is known as soon as the server runs; ``exit_code`` when it has ended."""

    def __init__(
        self,
        config: uvicorn.Config,
        serving: Serving,
        *,
        drain_s: float,
        certificate: Certificate | None = None,
        has_parent: bool = False,
        on_listening: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(config)
        config.timeout_graceful_shutdown = GRACE_S
        self.loop: Future[asyncio.AbstractEventLoop] = Future()
        self.exit_code = 0
        self.children = Children()
        self._serving = serving
        self._certificate = certificate
        self._drain_s = drain_s
        self._has_parent = has_parent
        self._on_listening = on_listening
        self._clock = clock
        self._drain_ends: float | None = None
        self._told_to_end = False
        self._reason = ""
        self._hurried = threading.Event()

    def run(self, sockets: list[socket] | None = None) -> None:
        """Serve until a signal, ``should_exit`` or ``hurry``.  No child is left."""
        super().run(sockets)
        self.children.end(CHILDREN_GRACE_S)

    async def serve(self, sockets: list[socket] | None = None) -> None:
        async with kept_fresh(self._certificate, say, self._serving.reload.within):
            await super().serve(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """A signal that was obeyed is not raised again, so the exit code is 0.  They are handled
        for as long as the process lives: a second one may come when the event loop has ended and
        the engine's processes have not."""
        for number in (signal.SIGTERM, HURRY if self._has_parent else signal.SIGINT):
            signal.signal(number, self.handle_exit)
        threading.Thread(target=self._end_by_force, name="end", daemon=True).start()
        self.loop.set_result(asyncio.get_running_loop())
        signal.signal(RELOAD, self._handle_reload)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {RELOAD})  # a front end is started without it
        try:
            yield
        finally:
            signal.signal(RELOAD, signal.SIG_IGN)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        is_second, self._told_to_end = self._told_to_end, True
        if sig == HURRY or (is_second and not self._has_parent):
            self.hurry(128 + sig)
        elif self._serving.chat is None:  # nothing runs yet
            self.hurry(0)
        else:
            self._serving.draining = True

    def _handle_reload(self, sig: int, frame: FrameType | None) -> None:
        self.loop.result().call_soon_threadsafe(self._reload)

    def _reload(self) -> None:
        self._serving.reload.give()
        say("SIGHUP: the key file and the certificate are read again")

    def hurry(self, exit_code: int, reason: str = "") -> None:
        """End now, from any thread: in good order if that takes no longer than ``HURRY_S``, else
        by force, with ``reason`` as the last word."""
        self.exit_code = exit_code
        self._reason = reason
        self.config.timeout_graceful_shutdown = HURRIED_GRACE_S
        self.should_exit = True
        self._hurried.set()

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._on_listening is not None:
            self._on_listening()

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second: whether to end."""
        if await super().on_tick(counter):
            return True
        return self._serving.draining and self._drained()

    def _drained(self) -> bool:
        requests = len(self.server_state.tasks)
        if self._drain_ends is None:
            self._drain_ends = self._clock() + self._drain_s
            say(f"draining: {requests} requests are open; they have {self._drain_s:g} s")
        return not requests or self._clock() >= self._drain_ends

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        self.should_exit = True  # after a drain, too: what the engine does from here on is its end
        if given_up := self._serving.give_up():
            say(f"{given_up} chats were given up")
        await super().shutdown(sockets)

    def _end_by_force(self) -> None:
        self._hurried.wait()
        time.sleep(HURRY_S)
        if self._reason:
            say(self._reason)
        self.children.end(grace_s=0)
        os._exit(self.exit_code)
