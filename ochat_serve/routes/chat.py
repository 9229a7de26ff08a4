"""``POST /v1/chat/completions``."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.routing import request_response

from ochat_serve.chat import Chat
from ochat_serve.protocol.chat import ChatCompletionRequest
from ochat_serve.routes.body import read_json
from ochat_serve.routes.connection import until_disconnect
from ochat_serve.routes.event_stream import EventStream, OpenStreams
from ochat_serve.routes.replies import caller_of, record_of, timeout_of
from ochat_serve.routes.uploads import Uploads
from ochat_serve.serving import Serving


class PlainRoute(APIRoute):
    """Described like any route, and called without FastAPI's dependencies, of which there are
    none: they would add a tenth to the cost of a short request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app = request_response(self.endpoint)


def router(serving: Serving, streams: OpenStreams, uploads: Uploads) -> APIRouter:
    routes = APIRouter(route_class=PlainRoute)

    @routes.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation, as one body or as a stream of events."""
        service = serving.require_chat()
        body = await read_json(request, ChatCompletionRequest, uploads)
        prepare = partial(
            service.prepare, body, record_of(request), caller_of(request), timeout_of(request.scope)
        )
        return await answer(prepare, request, streams)

    return routes


async def answer(
    prepare: Callable[[], Awaitable[Chat]], request: Request, streams: OpenStreams
) -> Response:
    """In the form that was asked for.  Raises ``ApiError`` and ``ClientDisconnect``."""
    async with until_disconnect(request.scope, request.receive):
        chat = await prepare()
        if not chat.form.stream:
            body = await chat.body()
            return Response(body, media_type="application/json", headers=chat.headers)
    return EventStream(chat.stream(), chat.headers, streams)
