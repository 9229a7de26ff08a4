"""Small pieces that every route and middleware shares: headers in, errors out."""

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.types import Scope

from ochat_serve.caller import Caller
from ochat_serve.errors import ApiError
from ochat_serve.request_log import RequestRecord


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that lower-case name."""
    return next((value for key, value in scope["headers"] if key == name), None)


def record_of(request: Request) -> RequestRecord:
    record: RequestRecord = request.state.record
    return record


def caller_of(request: Request) -> Caller:
    """Who asks.  Without keys everybody may do everything."""
    known: Caller | None = request.scope["state"].get("caller")
    if known is not None:
        return known
    key = record_of(request).key
    return Caller(key, role="admin" if key is None else "user")


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler of the app for ``ApiError``."""
    assert isinstance(error, ApiError)
    record_of(request).error = error.code or error.type
    return error_response(error)
