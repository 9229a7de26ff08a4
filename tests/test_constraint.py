"""What ``response_format`` and ``structured_outputs`` ask for, as a constraint."""

import json
from typing import Any

import pytest

from ochat_serve.constraint import constraint_of
from ochat_serve.errors import InvalidRequest
from ochat_serve.generation import ANY_OBJECT, Constraint
from ochat_serve.protocol.chat import ChatCompletionRequest

STOPS = (7,)
SCHEMA = {"type": "object", "properties": {"b": {}, "a": {"enum": ["é"]}}}
SCHEMA_TEXT = '{"type":"object","properties":{"b":{},"a":{"enum":["\\u00e9"]}}}'


def wanted(**fields: Any) -> Constraint | None:
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    return constraint_of(ChatCompletionRequest.model_validate_json(json.dumps(body)), STOPS)


def form(**fields: Any) -> dict[str, Any]:
    return {"response_format": fields}


def named(**fields: Any) -> dict[str, Any]:
    return form(type="json_schema", json_schema=fields)


def structured(**fields: Any) -> dict[str, Any]:
    return {"structured_outputs": fields}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        form(type="text"),
        structured(json_object=False),
        {**form(type="text"), **structured(json_object=False)},
    ],
)
def test_anything_goes(fields: dict[str, Any]) -> None:
    assert wanted(**fields) is None
    assert wanted(**fields, min_tokens=3, ignore_eos=True, stop_token_ids=[5]) is None


@pytest.mark.parametrize(
    ("fields", "kind", "text", "param"),
    [
        (form(type="json_object"), "json", ANY_OBJECT, "response_format"),
        (
            named(name="x", schema=SCHEMA),
            "json",
            SCHEMA_TEXT,
            "response_format.json_schema.schema",
        ),
        (named(name="x-1_Y", schema={}, strict=True, description="d"), "json", "{}", None),
        (named(name="x", schema={}, strict=False), "json", "{}", None),
        (structured(json=SCHEMA), "json", SCHEMA_TEXT, "structured_outputs.json"),
        (structured(json=json.dumps(SCHEMA)), "json", SCHEMA_TEXT, "structured_outputs.json"),
        (structured(json_object=True), "json", ANY_OBJECT, "structured_outputs.json_object"),
        (structured(json={}, json_object=False), "json", "{}", None),
        (structured(regex="a+"), "regex", "a+", "structured_outputs.regex"),
        (
            structured(choice=["a", 'b"\\\n\t\r\x01\x7fé']),
            "choice",
            'root ::= "a" | "b\\"\\\\\\n\\t\\r\\u0001\\u007fé"',
            "structured_outputs.choice",
        ),
        (
            structured(grammar='root ::= "a"'),
            "grammar",
            'root ::= "a"',
            "structured_outputs.grammar",
        ),
        ({**form(type="text"), **structured(regex="a")}, "regex", "a", None),
    ],
)
def test_what_is_wanted(fields: dict[str, Any], kind: str, text: str, param: str | None) -> None:
    constraint = wanted(**fields)
    assert (constraint.kind, constraint.text) == (kind, text)
    assert param in (None, constraint.param)
    assert text not in repr(constraint) or len(text) < 3


def test_a_schema_is_called_by_its_name() -> None:
    assert wanted(**named(name="city", schema={})).subject == "schema for response_format 'city'"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (form(type="json_schema"), "response_format.json_schema", "Missing required parameter"),
        (named(name="x"), "response_format.json_schema.schema", "Missing required parameter"),
        (
            form(type="text", json_schema={"name": "x", "schema": {}}),
            "response_format.json_schema",
            "only allowed",
        ),
        (
            named(name="x", schema={"enum": ["x" * 131_072]}),
            "response_format.json_schema.schema",
            "at most 131072 characters",
        ),
        (structured(), "structured_outputs", "must have one of"),
        (structured(regex="a", choice=["a"]), "structured_outputs", "exactly one"),
        (structured(json={}, json_object=True), "structured_outputs", "exactly one"),
        (
            {**form(type="json_object"), **structured(regex="a")},
            "structured_outputs",
            "cannot both",
        ),
        (structured(json="no"), "structured_outputs.json", "no JSON object"),
        (structured(json="[1]"), "structured_outputs.json", "no JSON object"),
        (structured(json="[" * 100_000), "structured_outputs.json", "no JSON object"),
        (structured(grammar='start: "a"'), "structured_outputs.grammar", "EBNF"),
        (
            structured(choice=["x" * 40_000]),
            "structured_outputs.choice",
            "at most 32768 characters",
        ),
        (structured(regex="a") | {"min_tokens": 2}, "min_tokens", "where the answer ends"),
        (structured(regex="a") | {"ignore_eos": True}, "ignore_eos", "where the answer ends"),
        (form(type="json_object") | {"stop_token_ids": [7, 5]}, "stop_token_ids", "where the"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        wanted(**fields)
    assert (refusal.value.status, refusal.value.param) == (400, param)
    assert words in refusal.value.message


def test_what_changes_nothing_may_stand_beside() -> None:
    fields = {"min_tokens": 0, "ignore_eos": False, "stop_token_ids": [7], "stop": "x", "n": 2}
    assert wanted(**form(type="json_object"), **fields)
