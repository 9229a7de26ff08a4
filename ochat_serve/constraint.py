"""What a request says about the look of its answer, as one ``Constraint``."""

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ochat_serve.errors import InvalidRequest
from ochat_serve.generation import ANY_OBJECT, Constraint
from ochat_serve.protocol.caps import MAX_GRAMMAR_CHARS, MAX_SCHEMA_CHARS
from ochat_serve.protocol.sampling import SamplingRequest
from ochat_serve.protocol.structured import ResponseFormat, StructuredOutputs

_ESCAPES = {"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"}


def constraint_of(request: SamplingRequest, stop_ids: Sequence[int]) -> Constraint | None:
    """None for an answer that may be anything.  Raises ``InvalidRequest``.

    ``stop_ids`` are the template's.
    """
    if request.response_format is None and request.structured_outputs is None:
        return None
    given = request.response_format
    wanted = None if given is None else _of_format(given)
    if (structured := request.structured_outputs) is not None:
        if wanted is not None:
            raise _wrong(
                "structured_outputs",
                "'structured_outputs' and 'response_format' cannot both say what the answer must "
                "look like.",
            )
        wanted = _of_structured(structured)
    if wanted is not None:
        _refuse_beside(request, stop_ids)
    return wanted


def _of_format(given: ResponseFormat) -> Constraint | None:
    if given.type != "json_schema":
        if given.json_schema is not None:
            raise _wrong(
                "response_format.json_schema",
                "'response_format.json_schema' is only allowed with the type 'json_schema'.",
            )
        return None if given.type == "text" else _any_object("response_format")
    for name, value in (
        ("json_schema", given.json_schema),
        ("json_schema.schema", given.json_schema and given.json_schema.schema_),
    ):
        if value is None:
            name = f"response_format.{name}"
            raise _wrong(name, f"Missing required parameter: '{name}'.", code=None)
    assert given.json_schema is not None
    return _schema(
        given.json_schema.schema_,
        param="response_format.json_schema.schema",
        subject=f"schema for response_format '{given.json_schema.name}'",
    )


def _any_object(param: str) -> Constraint:
    return Constraint("json", ANY_OBJECT, param=param, subject="schema")


def _schema(schema: Any, *, param: str, subject: str) -> Constraint:
    text = json.dumps(schema, separators=(",", ":"))
    _check_size(param, len(text), MAX_SCHEMA_CHARS)
    return Constraint("json", text, param=param, subject=subject)


def _of_structured(given: StructuredOutputs) -> Constraint | None:
    """``json_object: false`` alone says nothing, as in vLLM's API."""
    said = {name: value for name, value in given if value is not None and value is not False}
    if len(said) > 1:
        raise _wrong(
            "structured_outputs",
            "'structured_outputs' must have exactly one of 'json', 'json_object', 'regex', "
            "'choice' and 'grammar'.",
        )
    if not said:
        if given.json_object is False:
            return None
        raise _wrong(
            "structured_outputs",
            "'structured_outputs' must have one of 'json', 'json_object', 'regex', 'choice' and "
            "'grammar'.",
        )
    ((name, value),) = said.items()
    return _KINDS[name](value)


def _json(given: dict[str, Any] | str) -> Constraint:
    param = "structured_outputs.json"
    schema: Any = given
    if isinstance(given, str):
        try:
            schema = json.loads(given)
        except (ValueError, RecursionError):
            schema = None
        if not isinstance(schema, dict):
            raise _wrong(
                param, "Invalid value for 'structured_outputs.json': it is no JSON object."
            )
    return _schema(schema, param=param, subject="schema for structured_outputs")


def _regex(pattern: str) -> Constraint:
    return Constraint(
        "regex", pattern, param="structured_outputs.regex", subject="regular expression"
    )


def _grammar(text: str) -> Constraint:
    param = "structured_outputs.grammar"
    if "::=" not in text:
        raise _wrong(
            param, "Invalid grammar: it must be EBNF, with rules such as 'root ::= \"a\"'."
        )
    return Constraint("grammar", text, param=param, subject="grammar")


def _choice(choices: list[str]) -> Constraint:
    param = "structured_outputs.choice"
    grammar = "root ::= " + " | ".join(f'"{_escaped(choice)}"' for choice in choices)
    _check_size(param, len(grammar), MAX_GRAMMAR_CHARS)
    return Constraint("choice", grammar, param=param, subject="choice")


def _escaped(text: str) -> str:
    return "".join(
        _ESCAPES.get(char)
        or (f"\\u{ord(char):04x}" if ord(char) < 0x20 or char == "\x7f" else char)
        for char in text
    )


_KINDS: Mapping[str, Callable[[Any], Constraint]] = MappingProxyType(
    {
        "json_": _json,
        "json_object": lambda _: _any_object("structured_outputs.json_object"),
        "regex": _regex,
        "choice": _choice,
        "grammar": _grammar,
    }
)


def _refuse_beside(request: SamplingRequest, stop_ids: Sequence[int]) -> None:
    """An answer ends where its grammar ends, and nowhere else: what forbids that end, or ends it
    with a token of the grammar's, would leave no token to choose from."""
    stops = set(request.stop_token_ids or ()) - set(stop_ids)
    given = {"min_tokens": request.min_tokens, "ignore_eos": request.ignore_eos}
    for name, value in (given | {"stop_token_ids": stops}).items():
        if value:
            raise _wrong(
                name,
                f"'{name}' cannot be used together with 'response_format' or "
                "'structured_outputs', which say where the answer ends.",
            )


def _check_size(param: str, chars: int, most: int) -> None:
    if chars > most:
        raise _wrong(
            param, f"Invalid value for '{param}': must have at most {most} characters, not {chars}."
        )


def _wrong(param: str, message: str, code: str | None = "invalid_value") -> InvalidRequest:
    return InvalidRequest(message, param=param, code=code)
