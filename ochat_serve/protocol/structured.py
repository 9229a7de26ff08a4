"""``response_format`` and ``structured_outputs``: what an answer must look like.

The first is OpenAI's, the second vLLM's.  Shapes and sizes only: what a schema may say is decided
where it is compiled.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from ochat_serve.protocol.caps import (
    MAX_CHOICES,
    MAX_DESCRIPTION_CHARS,
    MAX_GRAMMAR_CHARS,
    MAX_REGEX_CHARS,
    MAX_SCHEMA_CHARS,
    MAX_SCHEMA_NAME_CHARS,
)

_CLOSED = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), serialize_by_alias=True)


def _schema_name(value: str) -> str:
    if not (value.isascii() and value.replace("_", "").replace("-", "").isalnum()) and value:
        raise PydanticCustomError("name", "must have letters, digits, underscores and dashes only")
    return value


def _printable(value: str) -> str:
    if "\0" in value:
        raise PydanticCustomError("nul", "must not contain the character U+0000")
    return value


def _object_or_text(value: Any) -> Any:
    if value is not None and not isinstance(value, dict | str):
        raise PydanticCustomError("schema", "must be a JSON object, or one in a string")
    if isinstance(value, str) and len(value) > MAX_SCHEMA_CHARS:
        raise PydanticCustomError(
            "too_many",
            "must have at most {most} characters, not {given}",
            {"most": MAX_SCHEMA_CHARS, "given": len(value)},
        )
    return value


class JsonSchemaFormat(BaseModel):
    """A schema with a name.  ``strict`` or not, the answer follows it."""

    model_config = _CLOSED
    name: Annotated[
        str, Field(min_length=1, max_length=MAX_SCHEMA_NAME_CHARS), AfterValidator(_schema_name)
    ]
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION_CHARS)] | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's word for the form of an answer."""

    model_config = _CLOSED
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


Text = Annotated[str, Field(min_length=1), AfterValidator(_printable)]


class StructuredOutputs(BaseModel):
    """vLLM's extension: exactly one of these."""

    model_config = _CLOSED
    json_: Annotated[
        dict[str, Any] | str | None, BeforeValidator(_object_or_text), Field(alias="json")
    ] = None
    json_object: bool | None = None
    regex: Annotated[Text, Field(max_length=MAX_REGEX_CHARS)] | None = None
    choice: (
        Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)] | None
    ) = None
    grammar: Annotated[Text, Field(max_length=MAX_GRAMMAR_CHARS)] | None = None
