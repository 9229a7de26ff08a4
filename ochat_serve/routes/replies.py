"""Small pieces that every route and middleware shares: headers in, errors out, hang-ups."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from ochat_serve.errors import ApiError
from ochat_serve.request_log import RequestRecord


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that lower-case name."""
    return next((value for key, value in scope["headers"] if key == name), None)


def record_of(request: Request) -> RequestRecord:
    record: RequestRecord = request.state.record
    return record


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler of the app for ``ApiError``."""
    assert isinstance(error, ApiError)
    record_of(request).error = error.code or error.type
    return error_response(error)


@asynccontextmanager
async def until_disconnect(receive: Receive) -> AsyncGenerator[None, None]:
    """Run the block for as long as the client stays; raise ``ClientDisconnect`` when it leaves.

    The block is cancelled exactly once, so that what it awaits while cleaning up (telling the
    engine) is not cancelled too.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()
