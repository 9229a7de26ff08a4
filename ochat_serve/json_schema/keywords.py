"""The words of a schema that the grammars' compiler understands, and what may stand behind each."""

import re
from collections.abc import Callable
from typing import Any

from ochat_serve.errors import shortened

Path = tuple[str, ...]

# They say something to people, or to programs that only show a schema.
DESCRIPTIVE = frozenset(
    {
        "$comment",
        "$id",
        "$schema",
        "contentEncoding",
        "contentMediaType",
        "default",
        "deprecated",
        "description",
        "discriminator",
        "example",
        "examples",
        "readOnly",
        "title",
        "writeOnly",
    }
)
DEFINITIONS = frozenset({"$defs", "definitions"})
# Each says all there is to say: nothing else may stand beside it.
WHOLE = ("$ref", "anyOf", "oneOf", "allOf")
FORMATS = frozenset(
    {
        "date",
        "date-time",
        "duration",
        "email",
        "hostname",
        "ipv4",
        "ipv6",
        "time",
        "uri",
        "uri-reference",
        "uri-template",
        "uuid",
    }
)
KEYWORDS_OF_TYPE = {
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems", "uniqueItems"}),
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
TYPED = frozenset().union(*KEYWORDS_OF_TYPE.values())
_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "array": (list,),
    "object": (dict,),
    "boolean": (bool,),
    "null": (type(None),),
}
# A character of a string that needs no escape.
PLAIN_CHAR = r'[^"\\\x00-\x1f]'
# The grammar writes what a pattern matches as it is, between quotes: quotes, backslashes and
# control characters would end the string or spoil it.  Classes (\s, \W, [^a]) leave them out.
_PATTERN = re.compile(r'(?:[^"\\\x00-\x1f\x7f]|\\[dDwWsS]|\\[!#-/:-@\[\]^_`{-~])*')


class SchemaError(Exception):
    """What is wrong, and at which place of the schema."""

    def __init__(self, path: Path, reason: str) -> None:
        where = ", ".join(repr(part[:64]) for part in path[-6:])
        super().__init__(f"In context=({where}), {reason}.")


def types_of(path: Path, schema: dict[str, Any]) -> list[str]:
    """All that the grammar will allow.  Without ``type``, what the keywords are about."""
    given = schema.get("type")
    if given is None:
        if "properties" in schema:
            return ["object"]
        return ["array"] if {"items", "prefixItems"} & schema.keys() else []
    types = given if isinstance(given, list) else [given]
    for kind in types:
        if not isinstance(kind, str) or kind not in KEYWORDS_OF_TYPE:
            raise SchemaError(path, f"'type' must be one of {', '.join(KEYWORDS_OF_TYPE)}")
    return types


def is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _PYTHON_TYPES[kind])


def at_most(path: Path, what: str, count: int, most: int) -> None:
    if count > most:
        raise SchemaError(path, f"the schema has more than {most} {what}")


def must_be_object(path: Path, word: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise SchemaError(path, f"'{word}' must be an object")


def _check_count(path: Path, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise SchemaError(path, f"a length must be a whole number from 0, not {shortened(value)}")


def _check_bound(path: Path, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise SchemaError(path, "a bound must be a number")


def _check_required(path: Path, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise SchemaError(path, "'required' must be a list of names")


def _check_format(path: Path, value: Any) -> None:
    if not isinstance(value, str) or value not in FORMATS:
        raise SchemaError(path, f"'format' must be one of {', '.join(sorted(FORMATS))}")


def _check_pattern(path: Path, value: Any) -> None:
    if not isinstance(value, str):
        raise SchemaError(path, "'pattern' must be a string")
    if not _PATTERN.fullmatch(value):
        raise SchemaError(
            path,
            "'pattern' is only supported without quotes, control characters, and escapes other "
            "than \\d, \\w, \\s, their opposites and those of punctuation",
        )


def _check_unique(path: Path, value: Any) -> None:
    if value is not False:
        raise SchemaError(path, "'uniqueItems' is not supported")


CHECKS: dict[str, Callable[[Path, Any], None]] = {
    "properties": lambda path, value: must_be_object(path, "properties", value),
    "required": _check_required,
    "pattern": _check_pattern,
    "format": _check_format,
    "uniqueItems": _check_unique,
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), _check_count),
    **dict.fromkeys(KEYWORDS_OF_TYPE["number"], _check_bound),
}
