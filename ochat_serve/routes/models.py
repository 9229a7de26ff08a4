"""``GET /v1/models`` and ``GET /v1/models/{id}``."""

from typing import Any

from fastapi import APIRouter, Request

from ochat_serve.errors import ModelNotFound
from ochat_serve.generation import ServedModel
from ochat_serve.routes.replies import caller_of
from ochat_serve.serving import Serving


def router(serving: Serving) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        """Every name that requests may use, the default first."""
        served = serving.require_chat().served
        names = served.names if served.is_open_to(caller_of(request).models) else ()
        return {"object": "list", "data": [_card(served, name) for name in names]}

    @routes.get("/v1/models/{model:path}")
    async def retrieve_model(request: Request, model: str) -> dict[str, Any]:
        served = serving.require_chat().served
        if model not in served.names or not served.is_open_to(caller_of(request).models):
            raise ModelNotFound(f"The model `{model[:100]}` does not exist.", param="model")
        return _card(served, model)

    return routes


def _card(served: ServedModel, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": served.owned_by,
        "root": served.names[0],
        "max_model_len": served.engine.info.max_model_len,
    }
