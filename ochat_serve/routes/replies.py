"""Small pieces that every route and middleware shares: headers in, errors out."""

import math

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.types import Scope

from ochat_serve.caller import Caller
from ochat_serve.errors import ApiError, InvalidRequest
from ochat_serve.request_log import RequestRecord

TIMEOUT_HEADER = "x-ochat-timeout-s"


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that lower-case name."""
    return next((value for key, value in scope["headers"] if key == name), None)


def record_of(request: Request) -> RequestRecord:
    record: RequestRecord = request.state.record
    return record


def caller_of(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


def timeout_of(scope: Scope) -> float:
    """How many seconds the client wants to wait at most.  Raises ``InvalidRequest``."""
    given = header(scope, TIMEOUT_HEADER.encode())
    if given is None:
        return math.inf
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise InvalidRequest(
            f"The header {TIMEOUT_HEADER} must be a number of seconds above 0.",
            param=TIMEOUT_HEADER,
        )
    return seconds


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler of the app for ``ApiError``."""
    assert isinstance(error, ApiError)
    record_of(request).error = error.code or error.type
    return error_response(error)
