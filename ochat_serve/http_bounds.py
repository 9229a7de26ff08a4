"""What one connection may cost: bytes before they are a request, and time.

h11 bounds a request's head (its request line and headers) only while that is incomplete, and
neither the number of headers nor that of a body's chunks: each costs some microseconds of the
event loop, whoever sends it.
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import h11

from ochat_serve.setting_values import Network

# As h11's own for what is incomplete; browsers and SDKs send less than 2 KiB.
MAX_HEAD_BYTES = 16 * 1024
# Clients and gateways send some twenty.
MAX_HEADERS = 128
# JSON written piece by piece comes in some ten chunks a message; so many are read in 40 ms.
MAX_CHUNKS = 8_192
# Requests that wait for the answer to the one before them; hardly any client sends any.
MAX_PIPELINED_BYTES = 256 * 1024
# The head of a request is one packet or two; whoever takes longer is no client.
HEADER_TIMEOUT_S = 10
# Of an answer that waits.  Fifty tokens a second are ten times as much in a stream, and the
# slowest of mobile networks carry five times as much.
MIN_READ_BYTES_PER_S = 1024
# What the kernel holds of an answer that is not read: else megabytes per connection.
_UNSENT_BYTES = 64 * 1024
_TCP_NOTSENT_LOWAT = 25  # Python 3.11 does not name it


@dataclass(frozen=True)
class Bounds:
    """Of each connection, in seconds; and how many there may be at once.  ``gateways`` bring many
    clients each."""

    header_timeout_s: float = HEADER_TIMEOUT_S
    read_timeout_s: float = 60
    write_timeout_s: float = 60
    max_connections: int = 4096
    gateways: tuple[Network, ...] = ()


class Refused(h11.RemoteProtocolError):
    """One sentence for the client; ``error_status_hint`` is its status."""


class BoundedConnection(h11.Connection):
    """h11's side of a connection.  Raises ``Refused`` where it has bounds that h11 has not."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self._chunks = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if type(event) is h11.Request:
            self._chunks = 0
            _check_head(event)
        elif type(event) is h11.Data and event.chunk_end:
            self._chunks += 1
            if self._chunks > MAX_CHUNKS:
                raise Refused(f"The body comes in more than {MAX_CHUNKS} chunks.")
        return event


def _check_head(request: h11.Request) -> None:
    count = len(request.headers)
    if count > MAX_HEADERS:
        raise Refused(f"The request has {count} headers; this server takes {MAX_HEADERS}.", 431)
    size = len(request.target) + sum(len(name) + len(value) for name, value in request.headers)
    if size > MAX_HEAD_BYTES:
        raise Refused(
            f"The request line and headers have {size} bytes; this server takes {MAX_HEAD_BYTES}.",
            431,
        )
    _check_framing(request, {name for name, _ in request.headers})


def _check_framing(request: h11.Request, names: set[bytes]) -> None:
    """Where the body ends must be said once.  A gateway that believes the other header takes
    the rest of one request for the next one (RFC 9112, 6.1)."""
    if b"transfer-encoding" not in names:
        return
    if b"content-length" in names:
        raise Refused("The request has both Transfer-Encoding and Content-Length.")
    if request.http_version < b"1.1":
        raise Refused("Transfer-Encoding is not in HTTP/1.0.")


class Deadline:
    """At most one call that will come unless it is stopped."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None

    def start(self, after_s: float, missed: Callable[[], None]) -> None:
        """If one is running already, it stays."""
        if self._timer is None:
            self._timer = self._loop.call_later(after_s, self._miss, missed)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _miss(self, missed: Callable[[], None]) -> None:
        self._timer = None
        missed()


def hold_little(transport: asyncio.Transport) -> None:
    """Have the kernel take no more of an answer than it can soon send."""
    _set_option(transport, socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _UNSENT_BYTES)


def drop(transport: asyncio.Transport) -> None:
    """Close at once; the kernel, too, forgets what was not sent, instead of trying for minutes."""
    _set_option(transport, socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _set_option(transport: asyncio.Transport, level: int, name: int, value: int | bytes) -> None:
    connection = transport.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError):  # not every socket is TCP, nor every system Linux
            connection.setsockopt(level, name, value)
