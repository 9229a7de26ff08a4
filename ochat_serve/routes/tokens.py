"""``POST /tokenize`` and ``POST /detokenize``."""

import json

from fastapi import APIRouter, Request, Response

from ochat_serve.notes import ignored_header
from ochat_serve.protocol.tokens import DetokenizeRequest, TokenizeRequest
from ochat_serve.routes.body import read_json
from ochat_serve.routes.connection import until_disconnect
from ochat_serve.routes.json_bounds import MAX_TOKEN_IDS
from ochat_serve.routes.replies import caller_of, record_of
from ochat_serve.routes.uploads import Uploads
from ochat_serve.serving import Serving
from ochat_serve.token_service import Told, detokenize, tokenize


def router(serving: Serving, uploads: Uploads) -> APIRouter:
    routes = APIRouter()

    @routes.post("/tokenize")
    async def create_tokens(request: Request) -> Response:
        """The token ids of a text, or of a conversation as the model would see it."""
        service = serving.require_chat()
        body = await read_json(request, TokenizeRequest, uploads)
        async with until_disconnect(request.scope, request.receive):
            told = await tokenize(service, body, record_of(request), caller_of(request))
        return _response(told)

    @routes.post("/detokenize")
    async def create_text(request: Request) -> Response:
        """The text of token ids."""
        service = serving.require_chat()
        body = await read_json(request, DetokenizeRequest, uploads, MAX_TOKEN_IDS)
        async with until_disconnect(request.scope, request.receive):
            told = await detokenize(service, body, record_of(request), caller_of(request))
        return _response(told)

    return routes


def _response(told: Told) -> Response:
    body = json.dumps(told.answer, ensure_ascii=False, separators=(",", ":"))
    headers = ignored_header(told.ignored)
    return Response(body, media_type="application/json", headers=headers)
