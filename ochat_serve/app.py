"""The HTTP application: routes and middleware, wired in one visible place."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from ochat_serve import __version__
from ochat_serve.errors import ApiError, InvalidRequest, MethodNotAllowed, NotFound
from ochat_serve.keys import ApiKeys
from ochat_serve.middleware.auth import Auth
from ochat_serve.middleware.boundary import Boundary
from ochat_serve.request_log import Log
from ochat_serve.routes import chat, models, ops
from ochat_serve.routes.event_stream import OpenStreams
from ochat_serve.routes.replies import on_api_error
from ochat_serve.serving import Serving
from ochat_serve.settings import Settings


def create_app(settings: Settings, serving: Serving, log: Log | None = None) -> FastAPI:
    """The app around ``serving``, which may become ready later.

    Its shutdown closes the engine.  The log is closed by whoever has opened it, when no request
    is left.
    """
    streams = OpenStreams(settings.ping_interval_s, time.monotonic, merges=settings.merges_streams)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        keep_alive = asyncio.create_task(streams.keep_alive())
        try:
            yield
        finally:
            keep_alive.cancel()
            with suppress(asyncio.CancelledError):
                await keep_alive
            if serving.chat is not None:
                await serving.chat.served.engine.close()

    app = FastAPI(
        title="ochat_serve",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=_middleware(settings, log),
    )
    app.include_router(chat.router(serving, streams, settings.max_body_bytes))
    app.include_router(models.router(serving))
    app.include_router(ops.router(serving))
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    return app


def _middleware(settings: Settings, log: Log | None) -> list[Middleware]:
    """From the outside in."""
    keys = ApiKeys(key.get_secret_value() for key in settings.api_keys)
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.allowed_origins,
        allow_methods=settings.allowed_methods,
        allow_headers=settings.allowed_headers,
        allow_credentials=settings.allow_credentials,
        expose_headers=("x-request-id", "x-ochat-ignored", "x-ochat-max-tokens", "retry-after"),
    )
    return [
        *([cors] if settings.allowed_origins else []),
        Middleware(
            Boundary,
            write=log.write if log else None,
            content=settings.log_content,
            clock=time.monotonic,
            now=time.time,
        ),
        Middleware(Auth, keys=keys),
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
