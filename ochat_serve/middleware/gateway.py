"""What a gateway in front has changed about a request is put right: who sent it, over what, and
under which path.

Headers can be written by anybody, so they are believed only from the addresses that the
operator trusts, and each address in them only as far as it was added by a trusted one.
"""

import functools
import ipaddress
import re
from collections.abc import Iterable, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from ochat_serve.setting_values import Network

_WITH_PORT = re.compile(r"\[(?P<v6>[^]]*)](:\d*)?|(?P<v4>[\d.]+):\d*")
_SCHEMES = ("http", "https")


class Gateway:
    """The outermost layer.  ``root_path`` is taken off requests that still have it, so that all
    others see the paths as routed."""

    def __init__(self, app: ASGIApp, trusted: Sequence[Network], root_path: str) -> None:
        self._app = app
        self._trusted = trusted
        self._root_path = root_path
        self._trusts = functools.lru_cache(4096)(self._is_trusted)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            peer = scope.get("client")
            if peer is not None and self._trusts(peer[0]):
                self._believe(scope, peer[0])
            if self._root_path:
                self._shorten(scope)
        await self._app(scope, receive, send)

    def _believe(self, scope: Scope, peer: str) -> None:
        hops = _values(scope, b"x-forwarded-for")
        if hops:
            client = self._client(peer, reversed(hops))
            if client != peer:
                scope["client"] = (client, 0)
        schemes = _values(scope, b"x-forwarded-proto")
        if schemes and schemes[-1] in _SCHEMES:
            scope["scheme"] = schemes[-1]

    def _client(self, peer: str, hops: Iterable[str]) -> str:
        """The nearest address that is not trusted; ``hops`` are the nearest first.  What is no
        address (``unknown``, nonsense) ends the way."""
        client = peer
        for hop in hops:
            address = _address(hop) if self._trusts(client) else None
            if address is None:
                break
            client = str(address)
        return client

    def _is_trusted(self, text: str) -> bool:
        address = _address(text)
        return address is not None and any(address in network for network in self._trusted)

    def _shorten(self, scope: Scope) -> None:
        prefix = self._root_path
        if scope["path"].startswith(prefix + "/"):
            scope["path"] = scope["path"][len(prefix) :]


def _values(scope: Scope, wanted: bytes) -> list[str]:
    """The items of a header that is a list, from all of its lines."""
    lines = [value for name, value in scope["headers"] if name == wanted]
    if not lines:
        return []
    return [item.strip() for item in b",".join(lines).decode("latin-1").split(",")]


def _address(hop: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """With or without a port; None for what is no address."""
    match = _WITH_PORT.fullmatch(hop)
    text = (match["v6"] or match["v4"]) if match else hop
    try:
        # Behind a % anything may stand.
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
