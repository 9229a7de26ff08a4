"""``POST /v1/chat/completions``."""

from fastapi import APIRouter, Request, Response

from ochat_serve.protocol.chat import ChatCompletionRequest
from ochat_serve.routes.body import read_json
from ochat_serve.routes.event_stream import EventStream, OpenStreams
from ochat_serve.routes.replies import record_of, until_disconnect
from ochat_serve.serving import Serving


def router(serving: Serving, streams: OpenStreams, max_body_bytes: int) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation, as one body or as a stream of events."""
        service = serving.require_chat()
        body = await read_json(request, ChatCompletionRequest, max_body_bytes)
        chat = await service.prepare(body, record_of(request))
        if chat.form.stream:
            return EventStream(chat.stream(), chat.headers, streams)
        async with until_disconnect(request.receive):
            answer = await chat.body()
        return Response(answer, media_type="application/json", headers=chat.headers)

    return routes
