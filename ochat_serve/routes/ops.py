"""For operators and their probes: liveness, readiness, version."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from ochat_serve import __version__
from ochat_serve.serving import LOADING_RETRY_S, Serving


def router(serving: Serving) -> APIRouter:
    routes = APIRouter()

    @routes.get("/livez")
    async def live() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @routes.get("/readyz")
    @routes.get("/health")
    async def ready() -> JSONResponse:
        """Whether chat requests are answered now."""
        is_ready, body = serving.status()
        if is_ready:
            return JSONResponse(body)
        return JSONResponse(body, 503, {"retry-after": str(LOADING_RETRY_S)})

    @routes.get("/version")
    async def version() -> dict[str, str | None]:
        chat = serving.chat
        return {"version": __version__, "vllm": chat.served.engine.info.version if chat else None}

    return routes
