"""``POST /tokenize`` and ``POST /detokenize``, in vLLM's words.

What vLLM has as two requests, of a text (``prompt``) and of a conversation (``messages``), is one
here: the second is a whole chat request, so that it means what it means there.
"""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ochat_serve.protocol.caps import MAX_MESSAGES, MAX_MODEL_CHARS
from ochat_serve.protocol.chat import ChatCompletionRequest, ChatMessage
from ochat_serve.protocol.prompts import token_ids


class TokenizeRequest(ChatCompletionRequest):
    """Either ``prompt`` or ``messages``."""

    messages: Annotated[list[ChatMessage], Field(max_length=MAX_MESSAGES, fail_fast=True)] = Field(
        []
    )
    prompt: str | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """Token ids; that they are in the vocabulary is checked where it is known."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    tokens: Annotated[list[int], BeforeValidator(token_ids)]
    model: Annotated[str, Field(max_length=MAX_MODEL_CHARS)] | None = None
