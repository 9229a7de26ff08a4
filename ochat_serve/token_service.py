"""Texts and conversations to token ids and back, as the model would see them.

A conversation goes the road of a chat up to where its prompt is known, so there are no second ids.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from ochat_serve.caller import Caller
from ochat_serve.chat_request import ignored_fields, named, refuse_unserved, unknown_fields
from ochat_serve.chat_service import ChatService
from ochat_serve.errors import ContextLengthExceeded, InvalidRequest, shortened
from ochat_serve.generation import ChatTurn, Conversation
from ochat_serve.protocol.tokens import DetokenizeRequest, TokenizeRequest
from ochat_serve.request_log import RequestRecord


@dataclass(frozen=True, slots=True)
class Told:
    """An answer, and the request's fields that had no part in it."""

    answer: dict[str, object]
    ignored: list[str]


async def tokenize(
    service: ChatService, request: TokenizeRequest, record: RequestRecord, caller: Caller
) -> Told:
    """vLLM's answer: the ids, their number, the most that the model takes.  Raises ``ApiError``.

    A prompt that does not fit is counted, too, unless it is certain beforehand that it is longer.
    """
    if (request.prompt is None) == (not request.messages):
        raise InvalidRequest("Give either 'messages' or 'prompt'.", param="messages")
    if request.prompt is not None:
        ids, ignored = await _of_text(service, request, request.prompt, record, caller)
    else:
        _check_form(request)
        prompt = await service.prompt(request, record, caller)
        ids, ignored = prompt.token_ids, prompt.ignored
    served, salt = service.served, service.salt(caller)
    strs = await served.prompts.token_strs(ids, salt) if request.return_token_strs else None
    answer: dict[str, object] = {
        "count": len(ids),
        "max_model_len": served.engine.info.max_model_len,
        "tokens": ids,
        "token_strs": strs,
    }
    return Told(answer, ignored)


async def _of_text(
    service: ChatService,
    request: TokenizeRequest,
    text: str,
    record: RequestRecord,
    caller: Caller,
) -> tuple[list[int], list[str]]:
    """As ``/v1/completions`` takes a text."""
    service.accept(request, record, caller)
    refuse_unserved(request)
    ignored = ignored_fields(request, uses_condition=False)
    service.refuse_if_strict(ignored)
    encode = partial(
        service.served.prompts.encode,
        text,
        add_special_tokens=request.add_special_tokens is not False,
        max_tokens=service.served.engine.info.max_model_len,
        cache_salt=service.salt(caller),
    )
    try:
        ids = await service.encoded(caller, as_said([text]), encode)
    except ContextLengthExceeded as error:
        raise error.about("prompt") from error
    return ids, ignored


def as_said(texts: Iterable[str]) -> Conversation:
    """Texts on their own as somebody's words, to ask how long they are."""
    return Conversation(tuple(ChatTurn("user", text) for text in texts))


def _check_form(request: TokenizeRequest) -> None:
    """A chat has one form: what would change it is refused, what only names it is taken."""
    if request.add_special_tokens:
        raise InvalidRequest(
            "'add_special_tokens' must not be true with 'messages': the template has put them "
            "where they belong.",
            param="add_special_tokens",
        )
    continues = request.messages[-1].role == "assistant"
    if request.continue_final_message and not continues:
        raise InvalidRequest(
            "'continue_final_message' needs a last message by the assistant.",
            param="continue_final_message",
        )
    if request.add_generation_prompt is not None and request.add_generation_prompt == continues:
        raise InvalidRequest(
            "'add_generation_prompt' must be what a chat does: true, but false where the last "
            "message is the assistant's, which is continued.",
            param="add_generation_prompt",
        )


async def detokenize(
    service: ChatService, request: DetokenizeRequest, record: RequestRecord, caller: Caller
) -> Told:
    """vLLM's answer: the text, control tokens spelled out.  Raises ``ApiError``."""
    service.accept(request, record, caller)
    ignored = named(unknown_fields(request))
    service.refuse_if_strict(ignored)
    check_token_ids(request.tokens, service.served.engine.info.vocab_size, "tokens")
    text = await service.served.prompts.decode(request.tokens, service.salt(caller))
    return Told({"prompt": text}, ignored)


def check_token_ids(token_ids: list[int], vocab_size: int, param: str) -> None:
    """Raises ``InvalidRequest`` for ids that the model does not have."""
    largest = max(token_ids, default=0)
    if largest >= vocab_size:
        raise InvalidRequest(
            f"Invalid value for '{param}': {shortened(largest)} is not a token id below "
            f"{vocab_size}.",
            param=param,
            code="invalid_value",
        )
