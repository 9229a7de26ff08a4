"""CORS as Starlette does it, with OpenAI's body for a preflight that is refused."""

from fastapi.middleware.cors import CORSMiddleware
from starlette.datastructures import Headers
from starlette.responses import Response

from ochat_serve.errors import InvalidRequest
from ochat_serve.routes.replies import error_response


class Cors(CORSMiddleware):
    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        refused = error_response(
            InvalidRequest(f"{bytes(answer.body).decode()}.", code="cors_refused")
        )
        for name in ("vary", "access-control-allow-origin"):
            if name in answer.headers:
                refused.headers[name] = answer.headers[name]
        return refused
