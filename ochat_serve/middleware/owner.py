"""Where no keys are set, who asks from this machine is its owner; who comes through a gateway that
stands on it is not."""

from dataclasses import replace

from starlette.types import ASGIApp, Receive, Scope, Send

from ochat_serve.errors import PermissionDenied
from ochat_serve.middleware.auth import ADMIN_PATHS
from ochat_serve.routes.replies import error_response
from ochat_serve.settings import is_loopback

# Any of them, believed or not: what comes from this machine itself has none.
_MARKS = frozenset({b"x-forwarded-for", b"forwarded", b"via", b"x-real-ip"})

_REFUSAL = "Through a gateway this needs the key of an administrator, and the server has no keys."


class OwnerCheck:
    """The layer below ``Auth``, which takes everybody for the owner: makes those from elsewhere
    users."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = scope.get("state", {}).get("caller")
        if caller is not None and caller.is_admin and not _is_from_here(scope):
            if scope["path"].startswith(ADMIN_PATHS):
                error = PermissionDenied(_REFUSAL)
                scope["state"]["record"].error = error.code
                await error_response(error)(scope, receive, send)
                return
            scope["state"]["caller"] = replace(caller, role="user")
        await self._app(scope, receive, send)


def _is_from_here(scope: Scope) -> bool:
    client = scope.get("client")
    through_a_gateway = any(name in _MARKS for name, _ in scope["headers"])
    return client is not None and is_loopback(client[0]) and not through_a_gateway
