"""No key, no entry: every route is closed unless it is named here."""

from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from ochat_serve.caller import Caller
from ochat_serve.errors import ApiError, InvalidApiKey, PermissionDenied
from ochat_serve.failed_attempts import FailedAttempts
from ochat_serve.key_ring import KeyRing, presented
from ochat_serve.limits import Limits
from ochat_serve.routes.replies import error_response, header

# Exact paths, as routed.  A browser's preflight carries no key; CORS answers it before this.
PUBLIC_PATHS = frozenset({"/livez"})
# What tells of all users, or of the server's inside.
ADMIN_PATHS = ("/metrics", "/openapi.json", "/docs", "/redoc")


class Gate:
    """Who may pass: ``keys``, or ``anonymous`` for everybody where no keys are set."""

    def __init__(
        self, keys: KeyRing, attempts: FailedAttempts, anonymous: Caller | None = None
    ) -> None:
        self._keys = keys
        self._attempts = attempts
        self._anonymous = anonymous

    def caller(self, authorization: bytes | None, address: str) -> Caller:
        """Raises ``InvalidApiKey`` and ``RequestsLimited``."""
        if self._anonymous is not None:
            return self._anonymous
        digest = presented(authorization)
        self._attempts.check(address, digest)
        try:
            caller = self._keys.identify(digest)
        except InvalidApiKey:
            self._attempts.failed(address)
            raise
        self._attempts.succeeded(address, digest)
        return caller


class Auth:
    """Finds the ``Caller`` of every request, known route or not, and counts it against the key's
    limit; puts the caller into the request's state."""

    def __init__(
        self,
        app: ASGIApp,
        gate: Gate,
        limits: Limits,
        admin_paths: Sequence[str] = ADMIN_PATHS,
    ) -> None:
        self._app = app
        self._gate = gate
        self._limits = limits
        self._admin_paths = tuple(admin_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in PUBLIC_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            caller = self._caller(scope)
            if caller.is_limited and scope["type"] == "http":
                scope["state"]["record"].sent_by(caller)
                scope["state"]["record"].headers.update(await self._limits.request(caller))
            self._check_path(scope, caller)
        except ApiError as error:
            if scope["type"] == "http":
                scope["state"]["record"].error = error.code
                await error_response(error)(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            scope["state"]["caller"] = caller
            scope["state"]["record"].sent_by(caller)
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller:
        client = scope.get("client")
        return self._gate.caller(header(scope, b"authorization"), client[0] if client else "")

    def _check_path(self, scope: Scope, caller: Caller) -> None:
        path: str = scope["path"]
        if not caller.is_admin and path.startswith(self._admin_paths):
            raise PermissionDenied("This needs the key of an administrator.")
