"""``POST /v1/chat/completions``: the request, field by field.

Types and ranges stand here; a field that is missing, null or at its default leaves no trace.
Source of names and types: OpenAI's API reference and SDK; the extensions at the end are
vLLM's words, ``condition`` is the reference server's.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WrapValidator
from pydantic_core import PydanticCustomError, ValidationError
from pydantic_core.core_schema import ValidatorFunctionWrapHandler

# Bounds on lists: a body of the largest size must cost milliseconds to refuse.
MAX_MESSAGES = 2_048
MAX_PARTS = 1_024
MAX_STOP = 4
MAX_STOP_CHARS = 1_000
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 300
MAX_METADATA = 16
INT64_MAX = 2**63 - 1
INT32_MAX = 2**31 - 1


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
        reason = "must be a string or a list of text parts"
        for part in value if isinstance(value, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind not in ("text", "refusal"):
                reason += f"; this server takes no part of type '{kind[:40]}'"
                break
        raise PydanticCustomError("content", "{reason}", {"reason": reason}) from None


def _one_stop_error(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        raise PydanticCustomError(
            "stop",
            "must be a non-empty string or a list of at most {most} non-empty strings",
            {"most": MAX_STOP},
        ) from None


def _no_controls(value: str) -> str:
    if any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in value):
        raise PydanticCustomError("condition", "must not contain control characters")
    return value


Parts = Annotated[
    list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]],
    Field(max_length=MAX_PARTS, fail_fast=True),
]
Content = Annotated[str | Parts | None, WrapValidator(_one_content_error)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stop = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=MAX_STOP)] | None,
    WrapValidator(_one_stop_error),
]


class ChatMessage(BaseModel):
    """One message.  ``developer`` counts as ``system``."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Content = None


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    model_config = ConfigDict(extra="allow", strict=True)
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatCompletionRequest(BaseModel):
    """The body of a chat completion request."""

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        allow_inf_nan=False,
        ser_json_inf_nan="null",
        protected_namespaces=(),
    )

    messages: Annotated[
        list[ChatMessage],
        Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
    ]
    model: str | None = None

    # Sampling
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_LOGIT_BIAS)
        ]
        | None
    ) = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=INT64_MAX)] | None = None
    stop: Stop = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None

    # The answer's form
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=64)],
                Annotated[str, Field(max_length=512)],
            ],
            Field(max_length=MAX_METADATA),
        ]
        | None
    ) = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=128)] | None = None

    # Extensions
    condition: Annotated[str, Field(max_length=64), AfterValidator(_no_controls)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: (
        Annotated[
            list[Annotated[int, Field(ge=0, le=INT32_MAX)]], Field(max_length=MAX_STOP_TOKEN_IDS)
        ]
        | None
    ) = None
    skip_special_tokens: bool | None = None
