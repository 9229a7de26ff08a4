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

    def headers_for(self, origin: str | None) -> dict[str, str]:
        """For an answer that does not come from the app.  None is an origin that is not known,
        because no request was read: then it can only be the one that is allowed."""
        if self.allow_all_origins:
            return dict(self.simple_headers)
        if origin is None and len(self.allow_origins) == 1:
            (origin,) = self.allow_origins
        if origin is None or not self.is_allowed_origin(origin):
            return {}
        return {**self.simple_headers, "Access-Control-Allow-Origin": origin, "Vary": "Origin"}
