"""A body that asks for too much gets its 400 before any text is encoded, and says why."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat_serve.app import create_app
from ochat_serve.chat_service import ChatService
from ochat_serve.errors import InvalidRequest
from ochat_serve.generation import Conversation
from ochat_serve.protocol import caps
from ochat_serve.routes.json_bounds import MAX_DEPTH, MAX_VALUES, check_values
from ochat_serve.serving import Serving
from ochat_serve.settings import Settings
from tests import fakes
from tests.fakes import ScriptedEngine, WordPrompts
from tests.live import LiveServer, live

CHAT = "/v1/chat/completions"
MESSAGE = {"role": "user", "content": "x"}
PART = {"type": "text", "text": "x"}


@dataclass
class Encoded(WordPrompts):
    """Counts the conversations that were encoded."""

    count: int = field(default=0)

    async def render(
        self,
        conversation: Conversation,
        max_tokens: int | None = None,
        cache_salt: str | None = None,
    ) -> list[int]:
        self.count += 1
        return [1]


@dataclass
class Capped:
    server: LiveServer
    engine: ScriptedEngine
    prompts: Encoded

    def post(self, body: dict[str, Any] | bytes) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        return httpx.post(self.server.url + CHAT, content=content, headers=headers, timeout=30)


@pytest.fixture(scope="module")
def capped() -> Iterator[Capped]:
    engine, prompts = ScriptedEngine(), Encoded()
    service: ChatService = fakes.service(engine, prompts=prompts)
    with live(create_app(Settings(), Serving("ready", service))) as server:
        yield Capped(server, engine, prompts)


def numbered(count: int, value: object = 1) -> dict[str, object]:
    return {str(number): value for number in range(count)}


def unknown(count: int) -> dict[str, int]:
    return {f"x{number}": 1 for number in range(count)}


def of_message(**fields: object) -> dict[str, object]:
    return {"messages": [{**MESSAGE, **fields}]}


def nested(levels: int) -> object:
    inner: object = 1
    for _ in range(levels):
        inner = [inner]
    return inner


def structured(**fields: object) -> dict[str, object]:
    return {"structured_outputs": fields}


def named_schema(**fields: object) -> dict[str, object]:
    schema = {"name": "x", "schema": {}, **fields}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


# what is capped: (its most, a request with so much of it, the param that is named)
CAPS: dict[str, tuple[int, Any, str | None]] = {
    "messages": (caps.MAX_MESSAGES, lambda n: {"messages": [MESSAGE] * n}, "messages"),
    "parts": (caps.MAX_PARTS, lambda n: of_message(content=[PART] * n), "messages.[0].content"),
    "n": (8, lambda n: {"n": n}, "n"),
    "stop": (caps.MAX_STOP, lambda n: {"stop": ["x"] * n}, "stop"),
    "one stop": (caps.MAX_STOP_CHARS, lambda n: {"stop": ["a", "x" * n]}, "stop"),
    "stop_token_ids": (
        caps.MAX_STOP_TOKEN_IDS,
        lambda n: {"stop_token_ids": [5] * n},
        "stop_token_ids",
    ),
    "logit_bias": (caps.MAX_LOGIT_BIAS, lambda n: {"logit_bias": numbered(n)}, "logit_bias"),
    "top_logprobs": (
        caps.MAX_TOP_LOGPROBS,
        lambda n: {"logprobs": True, "top_logprobs": n},
        "top_logprobs",
    ),
    "tools": (caps.MAX_TOOLS, lambda n: {"tools": [{}] * n, "tool_choice": "none"}, "tools"),
    "metadata": (caps.MAX_METADATA, lambda n: {"metadata": numbered(n, "x")}, "metadata"),
    "metadata names": (
        caps.MAX_METADATA_NAME_CHARS,
        lambda n: {"metadata": {"x" * n: "x"}},
        f"metadata.{'x' * 64}.[key]",
    ),
    "metadata values": (
        caps.MAX_METADATA_CHARS,
        lambda n: {"metadata": {"x": "x" * n}},
        "metadata.x",
    ),
    "user": (caps.MAX_USER_CHARS, lambda n: {"user": "x" * n}, "user"),
    "safety_identifier": (
        caps.MAX_SAFETY_IDENTIFIER_CHARS,
        lambda n: {"safety_identifier": "x" * n},
        "safety_identifier",
    ),
    "regex": (
        caps.MAX_REGEX_CHARS,
        lambda n: structured(regex="x" * n),
        "structured_outputs.regex",
    ),
    "grammar": (
        caps.MAX_GRAMMAR_CHARS,
        lambda n: structured(grammar="root ::= r".ljust(n, "r")),
        "structured_outputs.grammar",
    ),
    "choices": (
        caps.MAX_CHOICES,
        lambda n: structured(choice=["x"] * n),
        "structured_outputs.choice",
    ),
    "all choices": (
        caps.MAX_GRAMMAR_CHARS,
        lambda n: structured(choice=["x" * (n - len('root ::= ""'))]),
        "structured_outputs.choice",
    ),
    "schema": (
        caps.MAX_SCHEMA_CHARS,
        lambda n: named_schema(schema={"title": "x" * (n - len('{"title":""}'))}),
        "response_format.json_schema.schema",
    ),
    "name of a schema": (
        caps.MAX_SCHEMA_NAME_CHARS,
        lambda n: named_schema(name="x" * n),
        "response_format.json_schema.name",
    ),
    "description of a schema": (
        caps.MAX_DESCRIPTION_CHARS,
        lambda n: named_schema(description="x" * n),
        "response_format.json_schema.description",
    ),
    "condition": (caps.MAX_CONDITION_CHARS, lambda n: {"condition": "x" * n}, "condition"),
    "unknown fields": (caps.MAX_UNKNOWN_FIELDS, unknown, None),
    "unknown fields of a message": (
        caps.MAX_UNKNOWN_FIELDS,
        lambda n: of_message(**unknown(n)),
        None,
    ),
    "unknown fields of a part": (
        caps.MAX_UNKNOWN_FIELDS,
        lambda n: of_message(content=[{**PART, **unknown(n)}]),
        None,
    ),
}


@pytest.mark.parametrize("name", CAPS)
def test_the_most_is_taken_and_one_more_refused(capped: Capped, name: str) -> None:
    most, make, param = CAPS[name]
    assert capped.post({"messages": [MESSAGE], **make(most)}).status_code == 200
    before = capped.prompts.count, len(capped.engine.requests)
    refused = capped.post({"messages": [MESSAGE], **make(most + 1)})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, param)
    assert f"{most}" in error["message"]
    assert f"{most + 1}" in error["message"]
    assert (capped.prompts.count, len(capped.engine.requests)) == before


def test_the_longest_name_of_a_model_is_looked_up_and_a_longer_one_is_not(capped: Capped) -> None:
    most = caps.MAX_MODEL_CHARS
    assert capped.post({"messages": [MESSAGE], "model": "x" * most}).status_code == 404
    error = capped.post({"messages": [MESSAGE], "model": "x" * (most + 1)}).json()["error"]
    assert error["message"].endswith(f"must have at most {most} characters, not {most + 1}.")


SIZE = 4 * 2**20


def filled(piece: str) -> str:
    """A list of as many pieces as four megabytes hold."""
    return f"[{','.join([piece] * (SIZE // (len(piece) + 1) - 100))}]"


def named(value: str) -> str:
    return "{" + ",".join(f'"k{n}":{value}' for n in range(SIZE // (len(value) + 11))) + "}"


@pytest.mark.parametrize(
    "value",
    [
        filled("[]"),
        filled("{}"),
        filled('{"a":1}'),
        filled('""'),
        filled('"\\\\"'),
        filled('"\\""'),
        filled("1"),
        filled("[" * 150 + "]" * 150),
        named("1"),
        named('""'),
        "[" * (SIZE - 100),
        '{"":' * (SIZE // 4 - 100),
    ],
    ids=lambda value: value[:12],
)
@pytest.mark.parametrize("name", ["messages", "logit_bias", "metadata", "unknown"])
def test_bodies_that_are_all_structure_are_not_read(capped: Capped, name: str, value: str) -> None:
    refused = capped.post(f'{{"messages":[{json.dumps(MESSAGE)}],"{name}":{value}}}'.encode())
    assert refused.status_code == 400
    assert f"this server takes {MAX_VALUES}" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "text",
    ["plain text, [with] {marks} " * 150_000, '"' * 2_000_000, "\\" * 2_000_000, '\\"[,' * 600_000],
    ids=lambda text: text[:5],
)
def test_text_may_hold_any_number_of_marks(capped: Capped, text: str) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": text}]}, ensure_ascii=False)
    assert len(body) > 3 * 2**20
    assert capped.post(body.encode()).status_code == 200


@pytest.mark.parametrize("number", ["9" * 4_000_000, "1e" + "9" * 4_000_000, "-" * 4_000_000])
@pytest.mark.parametrize("name", ["n", "temperature", "seed"])
def test_numbers_of_megabytes(capped: Capped, name: str, number: str) -> None:
    refused = capped.post(f'{{"messages":[],"{name}":{number}}}'.encode())
    assert refused.status_code == 400
    assert len(refused.text) < 600


@pytest.mark.parametrize("where", ["unknown", "tools", "metadata", "message"])
def test_depth(capped: Capped, where: str) -> None:
    """The deepest that can be read harms nobody on its way, into the log either."""

    def ask(levels: int) -> httpx.Response:
        # The body itself is a level, a message in its list two more.
        if where == "message":
            return capped.post(of_message(x=nested(levels - 3)))
        return capped.post({"messages": [MESSAGE], where: nested(levels - 1)})

    assert ask(MAX_DEPTH).status_code == (400 if where in ("tools", "metadata") else 200)
    assert "parse" not in ask(MAX_DEPTH).text
    too_deep = ask(MAX_DEPTH + 1)
    assert too_deep.status_code == 400
    assert f"nested more than {MAX_DEPTH} levels deep" in too_deep.json()["error"]["message"]


JSON = st.recursive(
    st.none() | st.integers() | st.text('a"\\[]{},: \n') | st.booleans(),
    lambda children: (
        st.lists(children, max_size=8) | st.dictionaries(st.text('a"\\[,'), children, max_size=8)
    ),
    max_leaves=60,
)


def values(tree: object) -> int:
    """As ``check_values`` counts: an empty list counts, and so does what it would hold."""
    if isinstance(tree, dict):
        return 1 + max(len(tree) - 1, 0) + sum(map(values, tree.values()))
    if isinstance(tree, list):
        return 1 + max(len(tree) - 1, 0) + sum(map(values, tree))
    return 0


@settings(deadline=None, derandomize=True)
@given(JSON, st.booleans())
def test_values_are_counted_and_marks_in_text_are_not(tree: object, escaped: bool) -> None:
    body = json.dumps(tree, ensure_ascii=escaped).encode()
    check_values(body, most=values(tree))
    if values(tree):
        with pytest.raises(InvalidRequest):
            check_values(body, most=values(tree) - 1)


@pytest.mark.parametrize("value", ["{{ messages }}", "", None, {"a": "{% for x in y %}"}])
def test_a_chat_template_from_a_client_is_refused_wherever_it_stands(
    capped: Capped, value: object
) -> None:
    for fields in ({"chat_template": value}, {"chat_template_kwargs": {"chat_template": value}}):
        answer = capped.post({"messages": [MESSAGE], **fields})
        harmless = fields == {"chat_template": None}
        assert answer.status_code == (200 if harmless else 400)
        if not harmless:
            assert answer.json()["error"]["param"] == next(iter(fields))
