"""The HTTP application: routes and middleware, wired in one visible place."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import SecretStr
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import ASGIApp

from ochat_serve import __version__
from ochat_serve.caller import Caller, Key, LogContent, Role
from ochat_serve.errors import ApiError, InvalidRequest, MethodNotAllowed, NotFound
from ochat_serve.failed_attempts import FailedAttempts
from ochat_serve.key_file import KeyFile, watch
from ochat_serve.key_ring import KeyRing
from ochat_serve.limits import HEADER_PARTS, Limits
from ochat_serve.middleware.auth import Auth, Gate
from ochat_serve.middleware.boundary import Boundary
from ochat_serve.middleware.cors import Cors
from ochat_serve.middleware.gateway import Gateway
from ochat_serve.middleware.host import ANY, HostCheck
from ochat_serve.middleware.owner import OwnerCheck
from ochat_serve.request_log import Log, RequestRecord
from ochat_serve.routes import chat, completions, models, ops, tokens, usage
from ochat_serve.routes.event_stream import OpenStreams
from ochat_serve.routes.replies import on_api_error
from ochat_serve.routes.uploads import Uploads
from ochat_serve.serving import Serving
from ochat_serve.settings import Settings, is_loopback
from ochat_serve.usage.ledger import UsageLedger

logger = logging.getLogger(__name__)
# What a page in a browser may read of an answer.
EXPOSED_HEADERS = (
    "x-request-id",
    "x-ochat-ignored",
    "x-ochat-max-tokens",
    "retry-after",
    *(f"x-ratelimit-{part}-{what}" for what in ("requests", "tokens") for part in HEADER_PARTS),
)


def create_app(
    settings: Settings,
    serving: Serving,
    log: Log | None = None,
    *,
    key_file: KeyFile | None = None,
    ledger: UsageLedger | None = None,
) -> FastAPI:
    """The app around ``serving``, which may become ready later.

    Its shutdown closes the engine.  The log and the ledger are closed by whoever has opened them,
    when no request is left.  Raises ``KeyFileError``.
    """
    keys = KeyRing(_fixed_keys(settings), time.time)
    if key_file is not None:
        keys.replace(key_file.read().for_ring())
    writers = [*([log.write] if log else []), *([ledger.add] if ledger else [])]
    content = settings.log_content if log else None
    streams = OpenStreams(settings.ping_interval_s, time.monotonic, merges=settings.merges_streams)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        background = [
            asyncio.create_task(streams.keep_alive()),
            asyncio.create_task(serving.watch()),
        ]
        if key_file is not None:
            following = watch(key_file, keys.replace, logger.error, serving.reload.within)
            background.append(asyncio.create_task(following))
        try:
            yield
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await serving.limits.close()
            await serving.close()

    app = FastAPI(
        title="ochat_serve",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=_middleware(settings, writers, content, keys, serving.limits),
        servers=[{"url": settings.root_path}] if settings.root_path else None,
    )
    uploads = Uploads(settings.max_body_bytes)
    app.include_router(chat.router(serving, streams, uploads))
    app.include_router(completions.router(serving, streams, uploads))
    app.include_router(tokens.router(serving, uploads))
    app.include_router(models.router(serving))
    app.include_router(ops.router(serving, log))
    app.include_router(usage.router(ledger, time.time))
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    return app


def _fixed_keys(settings: Settings) -> list[Key]:
    """The keys that were given at start."""
    kinds: tuple[tuple[str, Role, tuple[SecretStr, ...]], ...] = (
        ("key", "user", settings.api_keys),
        ("admin", "admin", settings.admin_keys),
    )
    return [
        Key.of(secret.get_secret_value(), Caller(f"{kind}-{number}", role))
        for kind, role, secrets in kinds
        for number, secret in enumerate(secrets, 1)
    ]


def _anonymous(settings: Settings) -> Caller | None:
    """Everybody, where no keys are set: on this machine, its owner (``OwnerCheck`` looks further);
    from elsewhere, a user."""
    if settings.has_keys:
        return None
    return Caller(None, "admin" if is_loopback(settings.host) else "user")


def cors(app: ASGIApp, settings: Settings) -> Cors:
    return Cors(
        app,
        allow_origins=settings.allowed_origins,
        allow_methods=settings.allowed_methods,
        allow_headers=settings.allowed_headers,
        allow_credentials=settings.allow_credentials,
        expose_headers=EXPOSED_HEADERS,
    )


def _middleware(
    settings: Settings,
    writers: Sequence[Callable[[RequestRecord], None]],
    content: LogContent | None,
    keys: KeyRing,
    limits: Limits,
) -> list[Middleware]:
    """From the outside in."""
    checks_host = is_loopback(settings.host) and ANY not in settings.allowed_hosts
    gate = Gate(keys, FailedAttempts(time.monotonic), _anonymous(settings))
    return [
        Middleware(Gateway, trusted=settings.forwarded_allow_ips, root_path=settings.root_path),
        *([Middleware(cors, settings=settings)] if settings.allowed_origins else []),
        Middleware(
            Boundary,
            writers=writers,
            content=content,
            clock=time.monotonic,
            now=time.time,
        ),
        *([Middleware(HostCheck, allowed=settings.allowed_hosts)] if checks_host else []),
        Middleware(Auth, gate=gate, limits=limits),
        *([] if settings.has_keys else [Middleware(OwnerCheck)]),
    ]


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own errors (no such route, wrong method) in OpenAI's body."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    known: dict[int, ApiError] = {
        404: NotFound(f"Invalid URL ({where})."),
        405: MethodNotAllowed(f"Not allowed to {where}.", headers=dict(error.headers or {})),
    }
    return await on_api_error(request, known.get(error.status_code, InvalidRequest(error.detail)))
