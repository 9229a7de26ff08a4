"""The fields of every request that generates text: the model, how to sample, how to answer.

Types and ranges stand here; a field that is missing, null or at its default leaves no trace.
Source of names and types: OpenAI's API reference and SDK; the extensions at the end are vLLM's
words.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WrapValidator
from pydantic_core import PydanticCustomError, ValidationError
from pydantic_core.core_schema import ValidatorFunctionWrapHandler

from ochat_serve.protocol.caps import (
    MAX_LOGIT_BIAS,
    MAX_MODEL_CHARS,
    MAX_STOP,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
    MAX_USER_CHARS,
)
from ochat_serve.protocol.structured import ResponseFormat, StructuredOutputs

INT64_MAX = 2**63 - 1
INT32_MAX = 2**31 - 1


def too_many(most: int, given: int, what: str = "items") -> PydanticCustomError:
    return PydanticCustomError(
        "too_many",
        "must have at most {most} {what}, not {given}",
        {"most": most, "what": what, "given": given},
    )


def at_most(most: int) -> BeforeValidator:
    """Counted before its entries are looked at: pydantic describes every one that is wrong."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise too_many(most, len(value))
        return value

    return BeforeValidator(check)


def _one_stop_error(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        if isinstance(value, list) and len(value) > MAX_STOP:
            raise too_many(MAX_STOP, len(value), "strings") from None
        texts = value if isinstance(value, list) else [value]
        longest = max((len(text) for text in texts if isinstance(text, str)), default=0)
        if longest > MAX_STOP_CHARS:
            raise too_many(MAX_STOP_CHARS, longest, "characters") from None
        raise PydanticCustomError(
            "stop",
            "must be a non-empty string or a list of at most {most} non-empty strings",
            {"most": MAX_STOP},
        ) from None


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stop = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=MAX_STOP)] | None,
    WrapValidator(_one_stop_error),
]


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    model_config = ConfigDict(extra="allow", strict=True)
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingRequest(BaseModel):
    """What the body of any of these requests may hold."""

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        allow_inf_nan=False,
        ser_json_inf_nan="null",
        protected_namespaces=(),
    )

    model: Annotated[str, Field(max_length=MAX_MODEL_CHARS)] | None = None

    # Sampling
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], at_most(MAX_LOGIT_BIAS)]
        | None
    ) = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=INT64_MAX)] | None = None
    stop: Stop = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None

    # The answer's form
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: Annotated[str, Field(max_length=MAX_USER_CHARS)] | None = None

    # Extensions
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
    structured_outputs: StructuredOutputs | None = None
