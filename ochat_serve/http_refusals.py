"""An error that the connection itself answers with, because no app is asked or waited for."""

import json
from collections.abc import Callable

from uvicorn.protocols.http.h11_impl import STATUS_PHRASES

from ochat_serve.errors import ApiError

# The origin of a request, if it is known -> headers with which a page there may read an answer.
CorsHeaders = Callable[[str | None], dict[str, str]]


def no_cors(origin: str | None) -> dict[str, str]:
    return {}


def response(error: ApiError, cors: dict[str, str]) -> bytes:
    """The whole of it, as HTTP/1.1; the connection is closed after it."""
    body = json.dumps(error.body()).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **error.headers,
        **cors,
    }
    head = b"HTTP/1.1 %d %b\r\n" % (error.status, STATUS_PHRASES[error.status])
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return head + lines.encode() + b"\r\n" + body
