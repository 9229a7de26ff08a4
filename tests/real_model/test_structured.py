"""Answers that look as they were asked to, from a model too small to do so by itself."""

import enum
import json
import math
import re
from typing import Any, Literal

import httpx
import jsonschema
import pytest
from openai import LengthFinishReasonError, OpenAI
from pydantic import BaseModel, Field

from tests.hostile_grammars import HOSTILE
from tests.live import eventually
from tests.real_model.conftest import Demo
from tests.real_model.test_answers import CHAT, FRANCE, TIMEOUT_S, ask, stream, streamed_text, text

# With an example, or a model of this size writes until it is stopped.
PERSON = [
    {"role": "user", "content": "Anna is 31 years old."},
    {"role": "assistant", "content": '{"name":"Anna","age":31}'},
    {"role": "user", "content": "Paul is 42 years old."},
]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "partner": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/other"}]},
    },
    "required": ["name", "age", "tags", "partner"],
    "additionalProperties": False,
    "$defs": {"other": {"type": "string", "pattern": "[A-Z][a-z]{1,9}"}},
}


def json_schema(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, **more}}


def test_json_object(demo: Demo) -> None:
    answer = ask(demo, PERSON, response_format={"type": "json_object"}, max_tokens=300)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert isinstance(json.loads(text(answer)), dict)


@pytest.mark.parametrize("strict", [True, False, None])
def test_json_schema(demo: Demo, strict: bool | None) -> None:
    form = json_schema(SCHEMA, strict=strict)
    answer = ask(demo, PERSON, response_format=form, max_tokens=300)
    assert answer["choices"][0]["finish_reason"] == "stop"
    jsonschema.validate(json.loads(text(answer)), SCHEMA)


def test_streamed_it_is_the_same(demo: Demo) -> None:
    fields = {"response_format": json_schema(SCHEMA), "max_tokens": 300}
    assert streamed_text(stream(demo, PERSON, **fields)) == text(ask(demo, PERSON, **fields))


def test_every_choice_fits_at_a_high_temperature(demo: Demo) -> None:
    fields = {"response_format": json_schema(SCHEMA), "max_tokens": 400}
    answer = ask(demo, PERSON, n=4, temperature=1.5, seed=1, **fields)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(texts)) > 1
    for each in texts:
        jsonschema.validate(json.loads(each), SCHEMA)


def test_logprobs_stay_numbers(demo: Demo) -> None:
    """The tokens that the grammar forbids are infinitely unlikely, and JSON has no infinity."""
    fields = {"structured_outputs": {"choice": ["Rome"]}, "logprobs": True, "top_logprobs": 20}
    answer = ask(demo, FRANCE, **fields)
    assert text(answer) == "Rome"
    for position in answer["choices"][0]["logprobs"]["content"]:
        assert all(math.isfinite(top["logprob"]) for top in position["top_logprobs"])


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"regex": r"\d{3}-\d{4}"}, r"\d{3}-\d{4}"),
        ({"choice": ["Rome", "Oslo"]}, "Rome|Oslo"),
        ({"choice": [' "a\\b"\n é']}, re.escape(' "a\\b"\n é')),
        ({"grammar": 'root ::= "<" word ">"\nword ::= [a-z]{2,5}'}, "<[a-z]{2,5}>"),
        ({"json": {"enum": [1, "x"]}}, '1|"x"'),
        ({"json": '{"const":5}'}, "5"),
        ({"json_object": True}, r"\{.*\}"),
    ],
)
def test_structured_outputs(demo: Demo, fields: dict[str, Any], shape: str) -> None:
    answer = ask(demo, FRANCE, structured_outputs=fields, max_tokens=300)
    assert re.fullmatch(shape, text(answer), re.DOTALL), text(answer)
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_completions_too(demo: Demo) -> None:
    body = {"prompt": ["One, two,", "Red,"], "structured_outputs": {"regex": "[a-z]{3,9}!"}}
    answer = httpx.post(demo.url + "/v1/completions", json=body, timeout=TIMEOUT_S).json()
    assert all(re.fullmatch("[a-z]{3,9}!", choice["text"]) for choice in answer["choices"])
    assert len(answer["choices"]) == 2


def test_an_answer_that_is_cut_off_says_so(demo: Demo) -> None:
    form = json_schema(SCHEMA)
    answer = ask(demo, PERSON, response_format=form, max_tokens=5)
    assert answer["choices"][0]["finish_reason"] == "length"
    streamed = stream(demo, PERSON, response_format=form, max_tokens=5)
    assert streamed[-1]["choices"][0]["finish_reason"] == "length"


def test_a_stop_string_still_ends_it(demo: Demo) -> None:
    answer = ask(demo, PERSON, response_format=json_schema(SCHEMA), stop='"age"', max_tokens=100)
    assert '"age"' not in text(answer)
    assert text(answer).startswith('{"name"')


def test_the_log_knows_the_kind_and_not_the_text(demo: Demo) -> None:
    body = {"messages": FRANCE, "structured_outputs": {"choice": ["secret"]}}
    answer = httpx.post(demo.url + CHAT, json=body, timeout=TIMEOUT_S)
    line = demo.log_line(answer.headers["x-request-id"])
    assert line["parameters"]["constraint"] == "choice"
    assert "secret" not in json.dumps(line)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_a_400_and_the_next_request_a_200(demo: Demo, name: str) -> None:
    fields, reason = HOSTILE[name]
    answer = httpx.post(demo.url + CHAT, json={"messages": FRANCE, **fields}, timeout=TIMEOUT_S)
    assert answer.status_code == 400, answer.text
    assert reason in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"].startswith(next(iter(fields)))
    assert text(ask(demo, FRANCE, max_tokens=3))
    assert eventually(lambda: demo.unfinished() == 0)


class City(BaseModel):
    kind: Literal["city"]
    name: str = Field(max_length=20)


class River(BaseModel):
    kind: Literal["river"]
    length_km: int = Field(ge=0, le=10_000)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Place(BaseModel):
    """A model with what models have: nested, optional, chosen, listed."""

    what: City | River
    colour: Colour
    near: City | None
    notes: list[Literal["wet", "dry"]] = Field(max_length=2)


@pytest.fixture
def client(demo: Demo) -> OpenAI:
    with OpenAI(base_url=demo.url + "/v1", api_key="x", timeout=TIMEOUT_S) as made:
        yield made


def test_openai_parse(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="demo", messages=FRANCE, response_format=Place, max_tokens=400, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Place)


def test_openai_stream_parse(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="demo", messages=FRANCE, response_format=Place, max_tokens=400, temperature=0
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Place)


def test_openai_parse_of_what_was_cut_off(client: OpenAI) -> None:
    with pytest.raises(LengthFinishReasonError):
        client.chat.completions.parse(
            model="demo", messages=FRANCE, response_format=Place, max_tokens=5
        )
