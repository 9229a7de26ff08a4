"""From ``response_format`` over the checker to the engine, with both of them scripted."""

import json
from pathlib import Path

import httpx
import pytest

from ochat_serve.app import create_app
from ochat_serve.errors import InvalidRequest, Unavailable
from ochat_serve.server import open_log
from ochat_serve.settings import Settings
from tests.fakes import ScriptedEngine, ScriptedGrammars, WordPrompts, serving, words
from tests.live import live

ASK = {"messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"
REGEX = {"structured_outputs": {"regex": "secret+"}}


def chat(url: str, **fields: object) -> httpx.Response:
    return httpx.post(url + CHAT, json={**ASK, **fields}, timeout=10)


def test_a_plain_request_asks_no_checker() -> None:
    engine, grammars = ScriptedEngine(), ScriptedGrammars()
    with live(create_app(Settings(), serving(engine, grammars=grammars))) as server:
        assert chat(server.url).status_code == 200
        assert chat(server.url, response_format={"type": "text"}).status_code == 200
    assert grammars.asked == []
    assert [options.constraint for _, options in engine.requests] == [None, None]
    assert grammars.closed


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_checker_gives_reaches_the_engine(stream: bool) -> None:
    engine, grammars = ScriptedEngine(), ScriptedGrammars()
    settings = Settings(api_keys=("k",))
    with live(create_app(settings, serving(engine, settings, grammars=grammars))) as server:
        answer = httpx.post(
            server.url + CHAT,
            json={**ASK, **REGEX, "stream": stream},
            headers={"authorization": "Bearer k"},
        )
    assert answer.status_code == 200
    ((asked, caller),) = grammars.asked
    assert (asked.kind, asked.text, caller) == ("regex", "secret+", "key-1")
    ((_, options),) = engine.requests
    assert options.constraint.text == "checked secret+"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "refusal",
    [
        InvalidRequest("Invalid regular expression: x.", param="structured_outputs.regex"),
        Unavailable("Later.", code="overloaded", retry_after_s=5),
    ],
)
def test_what_it_refuses_never_reaches_the_engine(
    refusal: InvalidRequest | Unavailable, stream: bool
) -> None:
    engine, grammars = ScriptedEngine(), ScriptedGrammars(refuses=refusal)
    with live(create_app(Settings(), serving(engine, grammars=grammars))) as server:
        answer = chat(server.url, stream=stream, **REGEX)
        assert (answer.status_code, answer.json()) == (refusal.status, refusal.body())
        assert chat(server.url).status_code == 200
    assert len(engine.requests) == 1


def test_a_space_that_a_grammar_asks_for_is_the_answers() -> None:
    """Elsewhere an answer's first space is the tokenizer's, and dropped."""
    engine = ScriptedEngine(script=words(" a"))
    prompts = WordPrompts(begins_with_space=True)
    with live(create_app(Settings(), serving(engine, prompts=prompts))) as server:
        plain = chat(server.url).json()
        constrained = chat(server.url, **REGEX).json()
    assert plain["choices"][0]["message"]["content"] == "a"
    assert constrained["choices"][0]["message"]["content"] == " a"


@pytest.mark.parametrize("content", ["none", "full"])
def test_the_log_holds_the_text_only_where_it_holds_texts(tmp_path: Path, content: str) -> None:
    settings = Settings(log_file=str(tmp_path / "log"), log_content=content)
    log = open_log(settings)
    schema = {"type": "object", "properties": {"secret": {}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    app = create_app(settings, serving(ScriptedEngine(), settings), log)
    with live(app, closing=[log]) as server:
        assert chat(server.url, response_format=form).status_code == 200
    line = json.loads((tmp_path / "log").read_text())
    assert line["parameters"]["constraint"] == "json"
    assert "secret" not in json.dumps(line["parameters"])
    assert ("secret" in json.dumps(line)) == (content == "full")
    if content == "full":
        assert line["request"]["response_format"] == form


@pytest.mark.parametrize("stream", [False, True])
def test_completions_too(stream: bool) -> None:
    """Every prompt's choices have the form, and it is checked once."""
    engine, grammars = ScriptedEngine(), ScriptedGrammars()
    body = {"prompt": ["a", "b"], "stream": stream, **REGEX}
    with live(create_app(Settings(), serving(engine, grammars=grammars))) as server:
        assert httpx.post(server.url + "/v1/completions", json=body).status_code == 200
        grammars.refuses = InvalidRequest("No.")
        assert httpx.post(server.url + "/v1/completions", json=body).status_code == 400
    assert [options.constraint.text for _, options in engine.requests] == ["checked secret+"] * 2
    assert len(grammars.asked) == 2
