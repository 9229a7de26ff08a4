"""A server that only this machine can reach is not for the pages of strangers.

A web page can point a name of its own at 127.0.0.1 (DNS rebinding); its requests then come
from the user's browser, and the Host header is what gives them away.
"""

import ipaddress
from collections.abc import Iterable
from functools import lru_cache

from starlette.types import ASGIApp, Receive, Scope, Send

from ochat_serve.errors import InvalidRequest
from ochat_serve.routes.replies import error_response, header

ANY = "*"


class HostCheck:
    """Refuses requests to another host than this machine or those ``allowed``."""

    def __init__(self, app: ASGIApp, allowed: Iterable[str]) -> None:
        self._app = app
        self._allowed = frozenset(host.lower() for host in allowed) | {"localhost"}
        self._is_ours = lru_cache(1024)(self._names_us)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = header(scope, b"host")
            if host is not None and not self._is_ours(host):  # old clients send none
                scope["state"]["record"].error = "invalid_host"
                await error_response(
                    InvalidRequest(
                        "This server answers to this machine's own names only. Start it with "
                        "--allowed-hosts to let it answer to others.",
                        code="invalid_host",
                    )
                )(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _names_us(self, host: bytes) -> bool:
        name = _without_port(host.decode("latin-1")).lower().rstrip(".")
        return name in self._allowed or _is_loopback(name)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
