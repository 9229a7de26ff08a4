"""``POST /v1/completions``."""

from functools import partial

from fastapi import APIRouter, Request, Response

from ochat_serve.completion_service import prepare_completion
from ochat_serve.protocol.completion import CompletionRequest
from ochat_serve.routes.body import read_json
from ochat_serve.routes.chat import PlainRoute, answer
from ochat_serve.routes.event_stream import OpenStreams
from ochat_serve.routes.json_bounds import MAX_TOKEN_IDS
from ochat_serve.routes.replies import caller_of, record_of, timeout_of
from ochat_serve.routes.uploads import Uploads
from ochat_serve.serving import Serving


def router(serving: Serving, streams: OpenStreams, uploads: Uploads) -> APIRouter:
    routes = APIRouter(route_class=PlainRoute)

    @routes.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        """Go on from a text or from token ids, as one body or as a stream of events."""
        service = serving.require_chat()
        body = await read_json(request, CompletionRequest, uploads, MAX_TOKEN_IDS)
        prepare = partial(
            prepare_completion,
            service,
            body,
            record_of(request),
            caller_of(request),
            timeout_of(request.scope),
        )
        return await answer(prepare, request, streams)

    return routes
