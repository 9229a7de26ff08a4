"""``POST /v1/chat/completions``."""

from fastapi import Request, Response
from starlette.routing import Route

from ochat_serve.protocol.chat import ChatCompletionRequest
from ochat_serve.routes.body import read_json
from ochat_serve.routes.connection import until_disconnect
from ochat_serve.routes.event_stream import EventStream, OpenStreams
from ochat_serve.routes.replies import record_of
from ochat_serve.serving import Serving


def route(serving: Serving, streams: OpenStreams, max_body_bytes: int) -> Route:
    """A plain route: FastAPI's own would add a tenth to the cost of a short request for
    dependencies that there are none of."""

    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation, as one body or as a stream of events."""
        service = serving.require_chat()
        body = await read_json(request, ChatCompletionRequest, max_body_bytes)
        chat = await service.prepare(body, record_of(request))
        if chat.form.stream:
            return EventStream(chat.stream(), chat.headers, streams)
        async with until_disconnect(request.scope, request.receive):
            answer = await chat.body()
        return Response(answer, media_type="application/json", headers=chat.headers)

    return Route("/v1/chat/completions", create_chat_completion, methods=["POST"])
