"""Which schemas are served, and that an answer in their grammar keeps every promise of theirs."""

import json
import random
import warnings
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from ochat_serve.json_schema import SchemaError, check, checked
from ochat_serve.json_schema.keywords import DESCRIPTIVE, FORMATS, KEYWORDS_OF_TYPE

A = {"type": "object", "properties": {"k": {"const": "a"}}, "required": ["k"]}
B = {"type": "object", "properties": {"k": {"enum": ["b"]}, "x": {}}, "required": ["k", "x"]}


def obj(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


# Each is served; what its grammar can say is tried against the schema.
GOOD: list[Any] = [
    {},
    {"type": "string"},
    {"type": ["string", "null"]},
    {"type": "integer"},
    {"type": "number"},
    {"type": "boolean"},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "string", "maxLength": 3},
    {"type": "string", "minLength": 3},
    *({"type": "string", "format": name} for name in sorted(FORMATS)),
    *(
        {"type": "string", "pattern": pattern}
        for pattern in (
            "^a+$",
            "a|bc",
            r"^\d{3}-[A-F]{2}$",
            r"\.\-\(\)\[\]\{\}\/",
            r"^\S{1,5}$",
            r"^\s?\w\D$",
            "^[^a]{2,3}$",
            "^.{1,4}$",
            "^[!-~]{3}$",
            "é+",
            r"[\w.]{1,5}@[a-z]",
        )
    ),
    {"type": "integer", "minimum": -3, "maximum": 12},
    {"type": "integer", "exclusiveMinimum": 5},
    {"type": "integer", "maximum": -7},
    {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2.25},
    {"type": ["integer", "null"], "minimum": 5},
    {"enum": [1, 'a"b\\c\n', None, {"x": [1]}, "é"]},
    {"type": ["string", "null"], "enum": ["a", None]},
    {"const": {"a": 1}},
    {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
    {"type": "array", "items": {"type": "boolean"}, "uniqueItems": False},
    {
        "type": "array",
        "prefixItems": [{"const": 1}, {"type": "null"}],
        "items": False,
        "minItems": 2,
    },
    {"type": "array", "prefixItems": [{"const": 1}], "items": {"type": "boolean"}, "maxItems": 3},
    {"items": {"type": "null"}, "maxItems": 2},
    {"type": "object"},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "additionalProperties": False},
    obj(["a"], a={"type": "integer"}, b={"type": "null"}),
    obj(["b", "a"], a={"const": 1}, b={"const": 2}),
    obj(["a"], a={"type": "null"}) | {"additionalProperties": {"type": "boolean"}},
    {"properties": {"type": {"type": "string"}, "enum": {"type": "null"}}, "required": ["enum"]},
    {"type": ["object", "null"], "properties": {"a": {"const": 1}}, "required": ["a"]},
    {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 5}]},
    {"oneOf": [{"type": "null"}, {"type": ["string", "integer"]}]},
    {"oneOf": [A, B]},
    {"oneOf": [{"$ref": "#/$defs/a"}, B], "$defs": {"a": A}},
    {"allOf": [{"type": "boolean"}]},
    {"$ref": "#/$defs/a", "$defs": {"a": {"type": "boolean"}}, "description": "x"},
    {"$ref": "#/definitions/a", "definitions": {"a": {"type": "boolean"}}},
    obj(["a", "b"], a={"type": "boolean"}, b={"$ref": "#/properties/a"}),
    obj(["$ref"], **{"$ref": {"type": "null"}}),
    obj(["next"], next={"anyOf": [{"type": "null"}, {"$ref": "#"}]}),
    {"type": "string", "maxLength": 2} | dict.fromkeys(DESCRIPTIVE - {"$schema", "$id"}, "x"),
    obj(["a"], a=True),
]
# Each is refused, in these words.
BAD: list[tuple[dict[str, Any], str]] = [
    *(
        ({"type": kind, word: 1}, f"'{word}' is not supported")
        for kind, words in {
            "string": "foo contains",
            "integer": "multipleOf not if then else nullable",
            "array": "contains minContains maxContains unevaluatedItems additionalItems",
            "object": "minProperties maxProperties patternProperties propertyNames "
            "dependentRequired dependentSchemas dependencies unevaluatedProperties",
            "null": "$anchor $dynamicRef $dynamicAnchor $recursiveRef $vocabulary",
        }.items()
        for word in words.split()
    ),
    ({"minLength": 2}, "'minLength' needs the type string"),
    ({"type": "string", "minimum": 2}, "'minimum' needs the type integer or number"),
    ({"type": "array", "uniqueItems": True}, "'uniqueItems' is not supported"),
    ({"type": "string", "pattern": "a", "maxLength": 2}, "'maxLength' beside 'pattern'"),
    ({"type": "string", "pattern": "a", "format": "date"}, "'format' beside 'pattern'"),
    ({"type": "string", "format": "date", "minLength": 2}, "'minLength' beside 'format'"),
    ({"type": "string", "format": "regex"}, "'format' must be one of date, date-time"),
    *(
        ({"type": "string", "pattern": pattern}, "'pattern' is only supported without")
        for pattern in ('"', r"\"", r"\\", r"\x22", r"\u0022", r"\n", r"\b", "\n", '[a"]', r"\cA")
    ),
    ({"type": "string", "pattern": 1}, "'pattern' must be a string"),
    ({"enum": ["a"], "minLength": 2}, "'minLength' beside 'enum'"),
    ({"enum": ["a"], "const": "b"}, "'const' beside 'enum'"),
    ({"enum": []}, "'enum' must be a list"),
    ({"enum": "a"}, "'enum' must be a list"),
    ({"type": "integer", "enum": [1, True]}, "a value in 'enum' is not of its 'type'"),
    ({"type": "integer", "const": "x"}, "a value in 'const' is not of its 'type'"),
    ({"anyOf": [{}], "type": "string"}, "'type' beside 'anyOf'"),
    ({"anyOf": []}, "'anyOf' must be a list"),
    ({"anyOf": {}}, "'anyOf' must be a list"),
    ({"allOf": [{}, {}]}, "'allOf' of more than one"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {}}, "maxLength": 1}, "'maxLength' beside '$ref'"),
    ({"$ref": "#/$defs/a"}, "does not lead to a schema"),
    ({"$ref": "#a"}, "'$ref' must begin"),
    ({"$ref": 1}, "'$ref' must begin"),
    ({"$ref": "#/default", "default": {"not": {}}}, "does not lead to a schema"),
    ({"anyOf": [{"$ref": "#/$defs"}], "$defs": {"a": {}}}, "does not lead to a schema"),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "'oneOf' is only supported"),
    ({"oneOf": [A, A]}, "'oneOf' is only supported"),
    ({"oneOf": [A, {}]}, "'oneOf' is only supported"),
    ({"oneOf": [A, True]}, "'oneOf' is only supported"),
    ({"oneOf": [{"$ref": "#"}, A]}, "'oneOf' is only supported"),
    (obj(["b"], a={}), "'required' names 'b'"),
    ({"type": "object", "required": "a"}, "'required' must be a list"),
    ({"type": "object", "properties": []}, "'properties' must be an object"),
    ({"$defs": []}, "'$defs' must be an object"),
    ({"type": "array", "items": [{}]}, "a schema must be an object"),
    (obj([], a=1), "a schema must be an object"),
    (obj([], a=False), "a schema must be an object"),
    ({"type": "strin"}, "'type' must be one of string"),
    ({"type": 5}, "'type' must be one of string"),
    ({"type": [["string"]]}, "'type' must be one of string"),
    ({"type": "string", "minLength": -1}, "a whole number from 0"),
    ({"type": "string", "minLength": 1.5}, "a whole number from 0"),
    ({"type": "string", "minLength": True}, "a whole number from 0"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "'minLength' is more than"),
    ({"type": "array", "maxItems": 2**31}, "a whole number from 0"),
    ({"type": "integer", "minimum": "1"}, "a bound must be a number"),
    ({"enum": [*range(1001)]}, "more than 1000 values"),
    ({"type": "object", "properties": {str(n): {} for n in range(5001)}}, "5000 properties"),
    ({"anyOf": [{"type": "string", "pattern": "a"}] * 17}, "more than 16 patterns"),
]


def patterns_of(schema: dict[str, Any]) -> list[str]:
    return checked(json.dumps(schema)).patterns


@pytest.mark.parametrize(("schema", "words"), BAD, ids=lambda value: str(value)[:50])
def test_refused_by_name(schema: dict[str, Any], words: str) -> None:
    for whole in (schema, {"$defs": {"inner": schema}} | {"type": "null"}):
        if "$ref" in json.dumps(schema) and whole is not schema:
            continue  # its references are from the root
        with pytest.raises(SchemaError) as refusal:
            patterns_of(whole)
        assert words in str(refusal.value)


def test_the_place_is_named() -> None:
    with pytest.raises(SchemaError) as refusal:
        patterns_of(obj([], a={"type": "array", "items": {"not": {}}}))
    assert str(refusal.value) == (
        "In context=('properties', 'a', 'items'), 'not' is not supported."
    )


def test_names_from_outside_are_cut() -> None:
    for schema in (
        obj([], **{"x" * 10_000: {"not": 1}}),
        {"y" * 10_000: 1},
        {"$ref": "#/" + "z" * 9_000},
    ):
        with pytest.raises(SchemaError) as refusal:
            patterns_of(schema)
        assert len(str(refusal.value)) < 300


def test_depth() -> None:
    def nested(levels: int) -> dict[str, Any]:
        inner: dict[str, Any] = {"type": "null"}
        for _ in range(levels - 1):
            inner = {"type": "array", "items": inner}
        return inner

    assert patterns_of(nested(check.MAX_DEPTH)) == []
    with pytest.raises(SchemaError, match="nested more than 32 levels"):
        patterns_of(nested(check.MAX_DEPTH + 1))


def test_patterns_are_handed_on() -> None:
    schema = obj([], a={"type": "string", "pattern": "a+"}, b={"type": "string", "pattern": "b"})
    assert sorted(patterns_of(schema)) == ["a+", "b"]


def test_every_keyword_is_tried() -> None:
    tried = json.dumps(GOOD)
    for word in set().union(*KEYWORDS_OF_TYPE.values()):
        assert f'"{word}"' in tried, word


Sample = Callable[[str, int], str]


@pytest.fixture(scope="module")
def sample() -> Sample:
    """A text that a schema's grammar allows, character by character and without sense."""
    with warnings.catch_warnings(action="ignore"):  # transformers and torch warn while they import
        import xgrammar

    chars = [*map(chr, range(128)), *"é日🚀"]
    end = len(chars)
    info = xgrammar.TokenizerInfo([*chars, "</s>"], stop_token_ids=[end])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1)
    mask = xgrammar.allocate_token_bitmask(1, info.vocab_size)
    # What ends a string, a list or an object, so that walks come to an end.
    enders = [*b'"]},:']

    def walk(schema: str, seed: int) -> str:
        compiled = compiler.compile_json_schema(schema, any_whitespace=False, separators=(",", ":"))
        matcher, choose, text = xgrammar.GrammarMatcher(compiled), random.Random(seed), ""
        for step in range(2_000):
            matcher.fill_next_token_bitmask(mask)
            bits = mask[0].numpy().view("uint8")
            allowed = [n for n in range(end + 1) if bits[n // 8] >> n % 8 & 1]
            assert allowed, (schema, text)
            if end in allowed and (len(allowed) == 1 or choose.random() < 0.3 or step > 300):
                return text
            allowed = [n for n in allowed if n != end]
            ending = [n for n in enders if n in allowed]
            token = choose.choice(ending if ending and step > 60 else allowed)
            assert matcher.accept_token(token)
            text += chars[token]
        return ""  # without an end

    return walk


@pytest.mark.parametrize("schema", GOOD, ids=lambda schema: json.dumps(schema)[:60])
def test_what_the_grammar_allows_fits_the_schema(sample: Sample, schema: dict[str, Any]) -> None:
    compiled = checked(json.dumps(schema)).text
    texts = {sample(compiled, seed) for seed in range(60)} - {""}
    assert texts
    validator = jsonschema.Draft202012Validator(schema)
    for text in texts:
        validator.validate(json.loads(text))
