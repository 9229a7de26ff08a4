"""No key, no entry: every route is closed unless it is named here."""

from starlette.types import ASGIApp, Receive, Scope, Send

from ochat_serve.caller import Caller
from ochat_serve.errors import InvalidApiKey
from ochat_serve.keys import ApiKeys
from ochat_serve.routes.replies import error_response, header

# Exact paths, as routed.  A browser's preflight carries no key; CORS answers it before this.
PUBLIC_PATHS = frozenset({"/livez"})


class Auth:
    """Checks the ``Authorization`` header of every request, known route or not."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in PUBLIC_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            key = self._keys.check(header(scope, b"authorization"))
        except InvalidApiKey as error:
            if scope["type"] == "http":
                scope["state"]["record"].error = error.code
                await error_response(error)(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            caller = scope["state"].setdefault("caller", Caller(key))
            scope["state"]["record"].sent_by(caller)
        await self._app(scope, receive, send)
