"""A real server on a real port, inside the test's process.

Hang-ups, slow readers and half-sent bodies need sockets: no in-memory transport shows them.
"""

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import uvicorn
from fastapi import FastAPI

from ochat_serve.http_protocol import HttpProtocol
from ochat_serve.nudge import Nudge
from ochat_serve.tls import Certificate, kept_fresh

T = TypeVar("T")
START_TIMEOUT_S = 10
STOP_TIMEOUT_S = 40


class Closable(Protocol):
    def close(self) -> None: ...


class LiveServer:
    """``url`` is where it listens; ``call`` runs a coroutine on its event loop.  ``said`` is
    what it told whoever runs it."""

    def __init__(
        self,
        app: FastAPI,
        protocol: type[asyncio.Protocol] = HttpProtocol,
        certificate: Certificate | None = None,
        new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    ) -> None:
        self.unhandled: list[dict[str, Any]] = []  # what no code caught, told to the event loop
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{self.port}"
        self.said: list[str] = []
        self._certificate = certificate
        self._new_loop = new_loop
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=protocol,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=1,
                proxy_headers=False,
                ssl_context_factory=(lambda *_: certificate.context) if certificate else None,
            )
        )
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        async def main() -> None:
            self.loop = asyncio.get_running_loop()
            self.loop.set_exception_handler(lambda _, context: self.unhandled.append(context))
            async with kept_fresh(self._certificate, self.said.append, Nudge().within):
                await self._server.serve(sockets=[self._socket])

        with asyncio.Runner(loop_factory=self._new_loop) as runner:
            runner.run(main())

    def start(self) -> None:
        self._thread.start()
        assert eventually(lambda: self._server.started, START_TIMEOUT_S)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(STOP_TIMEOUT_S)
        assert not self._thread.is_alive()
        assert self.unhandled == []

    @property
    def connections(self) -> int:
        return len(self._server.server_state.connections)

    @property
    def transports(self) -> list[asyncio.Transport]:
        """Of the open connections."""
        return [connection.transport for connection in self._server.server_state.connections]

    def call(self, coroutine: Coroutine[Any, Any, T], timeout_s: float = 60) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)


@contextlib.contextmanager
def live(
    app: FastAPI,
    protocol: type[asyncio.Protocol] = HttpProtocol,
    closing: Sequence[Closable] = (),
    **options: Any,
) -> Iterator[LiveServer]:
    """``options`` are LiveServer's; ``closing`` is closed when no request is left, as
    ``server.serve`` does it with the log and the ledger."""
    server = LiveServer(app, protocol, **options)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        for each in closing:
            each.close()


def eventually(condition: Callable[[], object], within_s: float = 5) -> bool:
    """Whether ``condition()`` becomes true in time."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return bool(condition())


class RawClient:
    """One connection that says exactly what it is told; over TLS with ``tls``."""

    def __init__(
        self, port: int, receive_buffer: int | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self._socket = socket.socket()
        if receive_buffer is not None:  # bytes; the kernel heeds it before connecting only
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.settimeout(10)
        self._socket.connect(("127.0.0.1", port))
        if tls is not None:
            self._socket = tls.wrap_socket(self._socket, server_hostname="localhost")
        self.received = bytearray()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def post(self, path: str, body: bytes, *headers: str) -> None:
        lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
        lines += headers or ("Content-Type: application/json",)
        self.send("\r\n".join([*lines, "", ""]).encode() + body)

    def read_until(self, mark: bytes) -> bytes:
        """All that came since ``received`` was last cleared; more may follow the mark."""
        searched = 0
        while self.received.find(mark, searched) < 0:
            searched = max(0, len(self.received) - len(mark))
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionError(f"closed before {mark!r}: {self.received[-500:]!r}")
            self.received += data
        return bytes(self.received)

    def hang_up(self) -> None:
        self._socket.close()

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *exc: object) -> None:
        self.hang_up()
