"""For operators and their probes: liveness, readiness, version."""

import asyncio

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from ochat_serve import __version__
from ochat_serve.request_log import Log
from ochat_serve.serving import Serving

_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_DROPPED = """\
# HELP ochat_log_dropped_total Lines of the request log that were lost.
# TYPE ochat_log_dropped_total counter
ochat_log_dropped_total {}
"""


def router(serving: Serving, log: Log | None) -> APIRouter:
    routes = APIRouter()

    @routes.head("/livez", include_in_schema=False)
    @routes.get("/livez")
    async def live() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @routes.head("/health", include_in_schema=False)
    @routes.head("/readyz", include_in_schema=False)
    @routes.get("/health")
    @routes.get("/readyz")
    async def ready() -> JSONResponse:
        """Whether chat requests are answered now.  Costs the engine nothing."""
        trouble = serving.trouble
        if trouble is None:
            return JSONResponse({"status": "ready"})
        body = {"status": trouble.code, "phase": serving.phase, "reason": trouble.message}
        return JSONResponse(body, trouble.status, trouble.headers)

    @routes.get("/metrics")
    async def metrics() -> Response:
        """vLLM's own metrics for Prometheus and the log's, summed over all front ends."""
        engine = serving.require_loaded().served.engine
        text = await asyncio.to_thread(engine.metrics)
        if log is not None:
            text += _DROPPED.format(log.dropped).encode()
        return Response(text, media_type=_PROMETHEUS)

    @routes.get("/version")
    async def version() -> dict[str, str | None]:
        chat = serving.chat
        return {"version": __version__, "vllm": chat.served.engine.info.version if chat else None}

    return routes
