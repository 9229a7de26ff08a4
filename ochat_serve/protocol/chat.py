"""``POST /v1/chat/completions``: the request, field by field.

Types and ranges stand here; a field that is missing, null or at its default leaves no trace.
Source of names and types: OpenAI's API reference and SDK; the extensions at the end are
vLLM's words, ``condition`` is the reference server's.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WrapValidator
from pydantic_core import PydanticCustomError, ValidationError
from pydantic_core.core_schema import ValidatorFunctionWrapHandler

from ochat_serve.protocol.caps import (
    MAX_CONDITION_CHARS,
    MAX_LOGIT_BIAS,
    MAX_MESSAGES,
    MAX_METADATA,
    MAX_METADATA_CHARS,
    MAX_METADATA_NAME_CHARS,
    MAX_MODEL_CHARS,
    MAX_PARTS,
    MAX_SAFETY_IDENTIFIER_CHARS,
    MAX_STOP,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOP_LOGPROBS,
    MAX_USER_CHARS,
)

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
        if isinstance(value, list) and len(value) > MAX_PARTS:
            raise _too_many(MAX_PARTS, len(value), "parts") from None
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
        if isinstance(value, list) and len(value) > MAX_STOP:
            raise _too_many(MAX_STOP, len(value), "strings") from None
        texts = value if isinstance(value, list) else [value]
        longest = max((len(text) for text in texts if isinstance(text, str)), default=0)
        if longest > MAX_STOP_CHARS:
            raise _too_many(MAX_STOP_CHARS, longest, "characters") from None
        raise PydanticCustomError(
            "stop",
            "must be a non-empty string or a list of at most {most} non-empty strings",
            {"most": MAX_STOP},
        ) from None


def _too_many(most: int, given: int, what: str = "items") -> PydanticCustomError:
    return PydanticCustomError(
        "too_many",
        "must have at most {most} {what}, not {given}",
        {"most": most, "what": what, "given": given},
    )


def _at_most(most: int) -> BeforeValidator:
    """Counted before its entries are looked at: pydantic describes every one that is wrong."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise _too_many(most, len(value))
        return value

    return BeforeValidator(check)


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
    model: Annotated[str, Field(max_length=MAX_MODEL_CHARS)] | None = None

    # Sampling
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], _at_most(MAX_LOGIT_BIAS)]
        | None
    ) = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
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
                Annotated[str, Field(max_length=MAX_METADATA_NAME_CHARS)],
                Annotated[str, Field(max_length=MAX_METADATA_CHARS)],
            ],
            _at_most(MAX_METADATA),
        ]
        | None
    ) = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    user: Annotated[str, Field(max_length=MAX_USER_CHARS)] | None = None
    safety_identifier: Annotated[str, Field(max_length=MAX_SAFETY_IDENTIFIER_CHARS)] | None = None

    # Extensions
    condition: (
        Annotated[str, Field(max_length=MAX_CONDITION_CHARS), AfterValidator(_no_controls)] | None
    ) = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: (
        Annotated[
            list[Annotated[int, Field(ge=0, le=INT32_MAX)]],
            Field(max_length=MAX_STOP_TOKEN_IDS),
        ]
        | None
    ) = None
    skip_special_tokens: bool | None = None
