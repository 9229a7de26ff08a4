"""The server's certificate: loaded at the start, and again whenever its files change.

Each handshake takes the newest pair of files that fitted; connections keep theirs.
"""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from ochat_serve.errors import StartupError

POLL_INTERVAL_S = 1
# Of TLS 1.2: those that keep recorded traffic secret when the key leaks, and sign what they
# encrypt.  TLS 1.3 has no others.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
_MARKS = {
    "--ssl-certfile": (b"-----BEGIN CERTIFICATE-----", "certificate"),
    "--ssl-keyfile": (b"PRIVATE KEY-----", "private key"),
}
_REASONS = {"KEY_VALUES_MISMATCH": "do not belong together"}


class Certificate:
    """A certificate chain and its private key, as PEM files.  Raises ``StartupError`` if they
    are not, or do not belong together.

    ``context`` is for the server to listen with.
    """

    def __init__(self, certfile: str, keyfile: str) -> None:
        self._files = {"--ssl-certfile": certfile, "--ssl-keyfile": keyfile}
        self._loaded = self._polled = self._signature()
        self._failing = False
        self._newest = self.context = _load(self._files)
        # Not loaded into the context in use: between its two files, that would fit nobody.
        self.context.sni_callback = self._choose

    def _choose(self, connection: ssl.SSLObject, *_: object) -> None:
        connection.context = self._newest

    def refresh(self, *, at_once: bool = False) -> str | None:
        """Load the files if they have changed and, but ``at_once``, lie still since the last call.
        What to say of it: once for a pair that does not fit, however often it is tried again."""
        before, self._polled = self._polled, self._signature()
        if self._polled == self._loaded:
            self._failing = False
        elif at_once or self._polled == before:
            return self._reload()
        return None

    def _reload(self) -> str | None:
        try:
            self._newest = _load(self._files)
        except StartupError as error:
            said, self._failing = self._failing, True
            return None if said else f"{error} The certificate from before stays in use."
        self._loaded, self._failing = self._polled, False
        return "the new certificate is in use"

    def _signature(self) -> list[tuple[int, int, int] | None]:
        return [_signature(path) for path in self._files.values()]


@asynccontextmanager
async def kept_fresh(
    certificate: Certificate | None,
    say: Callable[[str], None],
    pause: Callable[[float], Awaitable[bool]],
) -> AsyncIterator[None]:
    """Reload the certificate, if there is one, when its files change within the block.  ``say``
    gets sentences for whoever runs the server; ``pause`` is ``Nudge.within``."""
    if certificate is None:
        yield
        return
    watcher = asyncio.create_task(_watch(certificate, say, pause))
    try:
        yield
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher


async def _watch(
    certificate: Certificate,
    say: Callable[[str], None],
    pause: Callable[[float], Awaitable[bool]],
) -> None:
    while True:
        at_once = await pause(POLL_INTERVAL_S)
        sentence = await asyncio.to_thread(certificate.refresh, at_once=at_once)
        if sentence is not None:
            say(sentence)


def _signature(path: str) -> tuple[int, int, int] | None:
    """Changes with the file's content; links are followed, as certbot makes them."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _load(files: dict[str, str]) -> ssl.SSLContext:
    for flag, path in files.items():
        _check(flag, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_ciphers(_CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    try:
        certfile, keyfile = files.values()
        context.load_cert_chain(certfile, keyfile, password=_refuse_to_ask)
    except ssl.SSLError as error:
        reason = error.reason or "unknown reason"
        why = _REASONS.get(reason, f"cannot be used: {reason.replace('_', ' ').lower()}")
        pair = " and ".join(f"{flag} {path}" for flag, path in files.items())
        raise StartupError(f"{pair} {why}.") from error
    except OSError as error:
        raise StartupError(f"The certificate cannot be read: {error.strerror}.") from error
    return context


def _check(flag: str, path: str) -> None:
    mark, what = _MARKS[flag]
    try:
        with open(path, "rb") as file:
            found = mark in file.read()
    except OSError as error:
        raise StartupError(f"{flag} {path} cannot be read: {error.strerror}.") from error
    if not found:
        raise StartupError(f"{flag} {path} holds no {what} in PEM format.")


def _refuse_to_ask() -> str:
    """OpenSSL would ask for it on the terminal, for as long as it takes."""
    raise StartupError("--ssl-keyfile has a passphrase: use a key without one.")
