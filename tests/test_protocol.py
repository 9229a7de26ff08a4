"""The request's shape: what is taken, what is refused, and in which words.

Bodies here are JSON text, as they come: what Python objects make of it is not the contract.
"""

import json
import re
from typing import Any

import pytest
from fastapi import Request
from pydantic import ValidationError

from ochat_serve.caller import Caller
from ochat_serve.errors import InvalidRequest
from ochat_serve.protocol.chat import ChatCompletionRequest
from ochat_serve.routes.body import invalid_request, read_json
from ochat_serve.routes.uploads import Uploads

MESSAGES = '"messages":[{"role":"user","content":"hi"}]'
BIG = str(2**63)
HUGE = "9" * 4_000


def parse(body: str | bytes) -> ChatCompletionRequest:
    """Raises ``InvalidRequest``, in the words that a client gets."""
    try:
        return ChatCompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise invalid_request(error) from error


def with_field(name: str, value: str) -> str:
    return f'{{{MESSAGES},"{name}":{value}}}'


def assert_clean(message: str) -> None:
    """One short sentence for a person: nothing of the library that found the error."""
    assert re.fullmatch(r"[A-Z][^\n]*\.", message), message
    assert len(message) < 400
    jargon = r"pydantic|https?:|\[type=|input_(value|type)|[Ss]hould|validation|pattern"
    assert not re.search(jargon, message), message


def pairs(count: int, value: Any) -> str:
    """A JSON object with so many keys, all of them numbers."""
    return json.dumps(dict.fromkeys(map(str, range(count)), value))


# name: (accepted JSON, refused JSON), of every field that the request knows
BOOL = (["true", "false"], ["1", '"true"', "[]"])
PENALTY = (["-2", "2", "0", "0.5"], ["2.01", "-2.01", '"1"', "true", "NaN", "Infinity"])
TEXT = (['""', '"x"', '"你好 👩‍🚀"'], ["1", "[]", "true"])
COUNT = (["1", "7", HUGE], ["0", "-1", "1.0", "1.5", '"1"', "true", "1e400", "NaN"])
FIELDS: dict[str, tuple[list[str], list[str]]] = {
    "messages": (
        ['[{"role":"user","content":"x"}]'],
        ["null", "[]", '"x"', "{}", "[1]", "[null]", '[{"role":"user","content":1}]'],
    ),
    "model": TEXT,
    "frequency_penalty": PENALTY,
    "presence_penalty": PENALTY,
    "logit_bias": (
        ["{}", '{"5":-100}', '{"5":100,"6":0.5}'],
        ['{"5":100.1}', '{"5":-101}', '{"5":"1"}', '{"5":null}', '{"5":NaN}', "[]", pairs(301, 0)],
    ),
    "logprobs": BOOL,
    "top_logprobs": (["0", "20"], ["-1", "21", "5.5", '"5"', "true"]),
    "max_tokens": COUNT,
    "max_completion_tokens": COUNT,
    "n": COUNT,
    "seed": (
        ["0", "-1", str(2**63 - 1), str(-(2**63))],
        [BIG, str(-(2**63) - 1), HUGE, "1.5", '"1"', "true"],
    ),
    "stop": (
        ['"x"', "[]", '["x"]', '["a","b","c","d"]', f'"{"x" * 1000}"'],
        ['""', '[""]', '["a","b","c","d","e"]', "1", "[1]", "{}", f'"{"x" * 1001}"', "[null]"],
    ),
    "temperature": (["0", "2", "0.7"], ["-0.1", "2.1", '"1"', "true", "NaN", "-Infinity", "1e999"]),
    "top_p": (["0", "1", "0.5"], ["-0.1", "1.1", '"1"', "NaN"]),
    "stream": BOOL,
    "stream_options": (
        ["{}", '{"include_usage":true,"include_obfuscation":false}', '{"include_usage":null}'],
        ["[]", "true", '{"include_usage":1}', '{"include_obfuscation":"yes"}'],
    ),
    "metadata": (
        [
            "{}",
            json.dumps({"k" * 64: "v" * 512}),
            pairs(16, ""),
        ],
        [
            '{"k":1}',
            '{"k":null}',
            "[]",
            json.dumps({"k" * 65: "v"}),
            json.dumps({"k": "v" * 513}),
            pairs(17, ""),
        ],
    ),
    "service_tier": (
        ['"auto"', '"default"', '"flex"', '"scale"', '"priority"', '"fast"'],
        ['"cheap"', "1"],
    ),
    "user": TEXT,
    "safety_identifier": (['""', f'"{"x" * 128}"'], [f'"{"x" * 129}"', "1"]),
    "condition": (
        ['""', '"Math Correct"', '"数学"', f'"{"x" * 64}"'],
        [f'"{"x" * 65}"', r'"a\nb"', r'"\u0000"', r'"\u007f"', r'"\u0085"', "1"],
    ),
    "top_k": (["-1", "0", "50", str(2**31 - 1)], ["-2", str(2**31), "1.5", '"1"']),
    "min_p": (["0", "1", "0.05"], ["-0.1", "1.1", "NaN"]),
    "repetition_penalty": (["1", "0.5", "100"], ["0", "-1", "101", "Infinity"]),
    "min_tokens": (["0", "5"], ["-1", str(2**31), "1.5"]),
    "ignore_eos": BOOL,
    "stop_token_ids": (
        ["[]", "[0]", json.dumps([*range(64)])],
        ["5", "[-1]", f"[{2**31}]", "[1.5]", '["5"]', json.dumps([*range(65)])],
    ),
    "skip_special_tokens": BOOL,
    "response_format": (
        [
            '{"type":"text"}',
            '{"type":"json_object"}',
            '{"type":"json_schema"}',
            '{"type":"json_schema","json_schema":{"name":"a_b-9","schema":{"a":1},"strict":true}}',
            json.dumps({"type": "json_schema", "json_schema": {"name": "n" * 64}}),
            '{"type":"text","json_schema":{"name":"x","description":"x","schema":null}}',
        ],
        [
            "1",
            '"text"',
            "[]",
            '{"type":"xml"}',
            '{"type":1}',
            '{"type":"json_schema","json_schema":[]}',
            '{"type":"json_schema","json_schema":{"name":""}}',
            '{"type":"json_schema","json_schema":{"name":"a b"}}',
            '{"type":"json_schema","json_schema":{"name":"é"}}',
            json.dumps({"type": "json_schema", "json_schema": {"name": "n" * 65}}),
            '{"type":"json_schema","json_schema":{"name":"x","schema":[]}}',
            '{"type":"json_schema","json_schema":{"name":"x","schema":true}}',
            '{"type":"json_schema","json_schema":{"name":"x","strict":"yes"}}',
        ],
    ),
    "structured_outputs": (
        [
            "{}",
            '{"json":{"type":"object"}}',
            '{"json":"{}"}',
            '{"json_object":true}',
            '{"regex":"a+"}',
            '{"choice":["a","b"]}',
            '{"grammar":"root ::= \\"a\\""}',
            '{"json":null,"regex":null}',
        ],
        [
            "1",
            '{"json":[]}',
            '{"json":1}',
            json.dumps({"json": "x" * 131_073}),
            '{"json_object":1}',
            '{"regex":""}',
            '{"regex":1}',
            '{"regex":"\\u0000"}',
            '{"choice":[]}',
            '{"choice":[""]}',
            '{"choice":[1]}',
            '{"choice":"a"}',
            '{"grammar":""}',
            '{"grammar":["a"]}',
        ],
    ),
}
accepted = [(name, value) for name, (values, _) in FIELDS.items() for value in values]
refused = [(name, value) for name, (_, values) in FIELDS.items() for value in values]


def short(value: Any) -> str:
    return str(value)[:40]


def test_the_table_has_every_field():
    assert FIELDS.keys() == ChatCompletionRequest.model_fields.keys()


@pytest.mark.parametrize(("name", "value"), accepted, ids=short)
def test_accepted(name: str, value: str):
    parsed = parse(with_field(name, value)).model_dump(exclude_unset=True)[name]
    assert parsed == json.loads(value)


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - {"messages"}))
def test_null_is_as_good_as_nothing(name: str):
    """Clients that dump their own objects send every field."""
    sent, silent = parse(with_field(name, "null")), parse(f"{{{MESSAGES}}}")
    assert sent.model_dump() == silent.model_dump()


@pytest.mark.parametrize(("name", "value"), refused, ids=short)
def test_refused_in_one_sentence(name: str, value: str):
    with pytest.raises(InvalidRequest) as refusal:
        parse(with_field(name, value))
    error = refusal.value
    assert (error.status, error.code) == (400, "invalid_value")
    assert error.param is not None
    assert re.match(rf"{name}(\.|$)", error.param)
    assert error.message.startswith(f"Invalid value for '{error.param}': must ")
    assert_clean(error.message)


@pytest.mark.parametrize(
    ("body", "sentence", "param"),
    [
        ("{}", "Missing required parameter: 'messages'.", "messages"),
        (
            '{"messages":[{}]}',
            "Missing required parameter: 'messages.[0].role'.",
            "messages.[0].role",
        ),
        (
            '{"messages":[]}',
            "Invalid value for 'messages': must have at least 1 item, not 0.",
            "messages",
        ),
        (
            with_field("n", "0"),
            "Invalid value for 'n': must be greater than or equal to 1.",
            "n",
        ),
        (
            with_field("stop", "[1]"),
            "Invalid value for 'stop': must be a non-empty string or a list of at most 4 "
            "non-empty strings.",
            "stop",
        ),
        (
            with_field("condition", r'"\n"'),
            "Invalid value for 'condition': must not contain control characters.",
            "condition",
        ),
        (
            '{"messages":[{"role":"tool","content":"x"}]}',
            "Invalid value for 'messages.[0].role': must be 'system', 'developer', 'user' or "
            "'assistant'.",
            "messages.[0].role",
        ),
        (
            '{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{}}]}]}',
            "Invalid value for 'messages.[0].content': must be a string or a list of text parts; "
            "this server takes no part of type 'image_url'.",
            "messages.[0].content",
        ),
        (
            with_field("response_format", "{}"),
            "Missing required parameter: 'response_format.type'.",
            "response_format.type",
        ),
        (
            with_field("response_format", '{"type":"json_schema","json_schema":{}}'),
            "Missing required parameter: 'response_format.json_schema.name'.",
            "response_format.json_schema.name",
        ),
        (
            with_field("response_format", '{"type":"xml"}'),
            "Invalid value for 'response_format.type': must be 'text', 'json_object' or "
            "'json_schema'.",
            "response_format.type",
        ),
        (
            with_field("structured_outputs", '{"structural_tag":"x"}'),
            "Unknown parameter: 'structured_outputs.structural_tag'.",
            "structured_outputs.structural_tag",
        ),
        ("null", "The request body must be a JSON object.", None),
        ("[]", "The request body must be a JSON object.", None),
        ('"messages"', "The request body must be a JSON object.", None),
    ],
)
def test_sentences(body: str, sentence: str, param: str | None):
    with pytest.raises(InvalidRequest) as refusal:
        parse(body)
    assert (refusal.value.message, refusal.value.param) == (sentence, param)


@pytest.mark.parametrize(
    "content",
    [
        "1",
        "true",
        "{}",
        '["x"]',
        '[{"type":"text"}]',
        '[{"text":"x"}]',
        '[{"type":"text","text":1}]',
        '[{"type":"text","text":null}]',
        '[{"type":null,"text":"x"}]',
        '[{"type":"text","text":"x"},{"type":"input_audio","input_audio":{}}]',
        '[{"type":"file","file":{}}]',
        f'[{{"type":"{"x" * 10_000}"}}]',
    ],
    ids=short,
)
def test_content_that_is_no_text(content: str):
    with pytest.raises(InvalidRequest) as refusal:
        parse(f'{{"messages":[{{"role":"user","content":{content}}}]}}')
    assert refusal.value.param == "messages.[0].content"
    assert_clean(refusal.value.message)


@pytest.mark.parametrize("role", ["tool", "function", "User", "", "system\\n"])
def test_roles_that_no_template_can_say(role: str):
    """A role goes into the prompt's header: only known words may."""
    with pytest.raises(InvalidRequest) as refusal:
        parse(f'{{"messages":[{{"role":"{role}","content":"x"}}]}}')
    assert refusal.value.param == "messages.[0].role"
    assert_clean(refusal.value.message)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "{'messages':[]}",
        "not json",
        f"{{{MESSAGES},}}",
        f"{{{MESSAGES}}} {{}}",
        '{"messages":[{"role":"user","content":"\n"}]}',
        b'{"messages":[{"role":"user","content":"\xff"}]}',
        b"\xef\xbb\xbf{}",
        with_field("user", r'"\ud800"'),
        with_field("user", r'"\udc00x"'),
        with_field("user", r'"\ud83d\u0041"'),
        with_field("unknown", r'"\ud800"'),
        with_field(r"\ud800", "1"),
        r'{"messages":[{"role":"user","content":"\ud83d"}]}',
        with_field("n", "9" * 5_000),
        with_field("unknown", "[" * 100_000),
        with_field("unknown", '{"a":' * 100_000),
        with_field("unknown", "[" * 1_000 + "]" * 1_000),
        '{"messages":' + "[" * 1_000 + "]" * 1_000 + "}",
    ],
    ids=short,
)
def test_what_is_no_json(body: str | bytes):
    """Half a surrogate pair is no text: it could not be encoded later on."""
    with pytest.raises(InvalidRequest) as refusal:
        parse(body)
    assert refusal.value.message.startswith("We could not parse the JSON body of your request: ")
    assert refusal.value.param is None
    assert_clean(refusal.value.message)


def test_whole_surrogate_pairs_are_text():
    (message,) = parse(r'{"messages":[{"role":"user","content":"\ud83d\ude80"}]}').messages
    assert message.content == "🚀"


def test_nesting_that_is_only_deep_is_fine():
    assert parse(with_field("unknown", "[" * 100 + "]" * 100)).model_extra


def test_of_duplicate_keys_the_last_one_counts():
    assert parse(f'{{{MESSAGES},"n":1,"n":2}}').n == 2


def test_names_from_outside_are_cut():
    """The name of a field can be as long as the body; the answer must not be."""
    with pytest.raises(InvalidRequest) as refusal:
        parse(with_field("metadata", json.dumps({"k" * 100_000: 1})))
    assert_clean(refusal.value.message)
    assert refusal.value.param is not None
    assert len(refusal.value.param) < 100


async def read(body: bytes) -> ChatCompletionRequest:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {
        "type": "http",
        "headers": [(b"content-type", b"application/json")],
        "state": {"caller": Caller("alice")},
    }
    return await read_json(Request(scope, receive), ChatCompletionRequest, Uploads(1_000_000))


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "[1, NaN]", '{"a": Infinity}'])
@pytest.mark.parametrize("name", ["unknown", "response_format", "temperature"])
async def test_words_that_only_some_json_readers_know(name: str, word: str):
    """In fields that are only passed on, too: the request log would not be JSON any more."""
    with pytest.raises(InvalidRequest) as refusal:
        await read(with_field(name, word).encode())
    assert_clean(refusal.value.message)


async def test_text_may_speak_of_infinity():
    request = await read(with_field("user", '"NaN and Infinity"').encode())
    assert request.user == "NaN and Infinity"
