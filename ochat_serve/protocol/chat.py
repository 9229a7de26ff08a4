"""``POST /v1/chat/completions``: the request, field by field.

``condition`` is the reference server's; see ``sampling`` for the fields of every generation.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WrapValidator
from pydantic_core import PydanticCustomError, ValidationError
from pydantic_core.core_schema import ValidatorFunctionWrapHandler

from ochat_serve.protocol.caps import (
    MAX_CONDITION_CHARS,
    MAX_MESSAGES,
    MAX_METADATA,
    MAX_METADATA_CHARS,
    MAX_METADATA_NAME_CHARS,
    MAX_PARTS,
    MAX_SAFETY_IDENTIFIER_CHARS,
    MAX_TOP_LOGPROBS,
)
from ochat_serve.protocol.sampling import SamplingRequest, at_most, too_many


class TextPart(BaseModel):
    """A piece of a message's content.  Only text is served."""

    model_config = ConfigDict(extra="allow")
    type: Literal["text"]
    text: str


class RefusalPart(BaseModel):
    """A refusal in an assistant message of the history."""

    model_config = ConfigDict(extra="allow")
    type: Literal["refusal"]
    refusal: str


def _one_content_error(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """One sentence instead of an error for every member of the union."""
    try:
        return handler(value)
    except ValidationError:
        if isinstance(value, list) and len(value) > MAX_PARTS:
            raise too_many(MAX_PARTS, len(value), "parts") from None
        reason = "must be a string or a list of text parts"
        for part in value if isinstance(value, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind not in ("text", "refusal"):
                reason += f"; this server takes no part of type '{kind[:40]}'"
                break
        raise PydanticCustomError("content", "{reason}", {"reason": reason}) from None


def _no_controls(value: str) -> str:
    if any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in value):
        raise PydanticCustomError("condition", "must not contain control characters")
    return value


Parts = Annotated[
    list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]],
    Field(max_length=MAX_PARTS, fail_fast=True),
]
Content = Annotated[str | Parts | None, WrapValidator(_one_content_error)]


class ChatMessage(BaseModel):
    """One message.  ``developer`` counts as ``system``."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Content = None


class ChatCompletionRequest(SamplingRequest):
    """The body of a chat completion request."""

    messages: Annotated[
        list[ChatMessage],
        Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
    ]

    # Sampling
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    # The answer's form
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=MAX_METADATA_NAME_CHARS)],
                Annotated[str, Field(max_length=MAX_METADATA_CHARS)],
            ],
            at_most(MAX_METADATA),
        ]
        | None
    ) = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    safety_identifier: Annotated[str, Field(max_length=MAX_SAFETY_IDENTIFIER_CHARS)] | None = None

    # Extensions
    condition: (
        Annotated[str, Field(max_length=MAX_CONDITION_CHARS), AfterValidator(_no_controls)] | None
    ) = None
