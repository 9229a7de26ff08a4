"""The chat route over a real socket, with a scripted engine behind it."""

import json
import time

import httpx
import pytest

from ochat_serve.app import create_app
from ochat_serve.errors import ServerFault, Unavailable
from ochat_serve.generation import Delta, Update
from ochat_serve.settings import Settings
from tests.fakes import ScriptedEngine, Wait, serving, words
from tests.live import RawClient, eventually, live

ASK = {"messages": [{"role": "user", "content": "say hi to me"}]}
CHAT = "/v1/chat/completions"


def events(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


def chat(url: str, **fields: object) -> httpx.Response:
    return httpx.post(url + CHAT, json={**ASK, **fields}, timeout=10)


def test_one_body() -> None:
    engine = ScriptedEngine()
    with live(create_app(Settings(), serving(engine))) as server:
        answer = chat(server.url)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "openchat_3.6"
    assert body["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Hi!",
        "refusal": None,
    }
    assert body["usage"]["prompt_tokens"] == 4
    assert body["usage"]["completion_tokens"] == 2
    assert engine.closed, "the app's shutdown closes the engine"


def test_stream_is_the_same_answer_in_events() -> None:
    engine = ScriptedEngine(script=words("H", "", "\N{PILE OF POO}", "\n", finish="length"))
    with live(create_app(Settings(), serving(engine))) as server:
        answer = chat(server.url, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    *chunks, done = events(answer.text)
    assert done == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    assert parsed[0]["choices"][0]["delta"]["role"] == "assistant"
    texts = [choice["delta"].get("content", "") for c in parsed for choice in c["choices"]]
    assert "".join(texts) == "H\N{PILE OF POO}\n"
    reasons = [choice["finish_reason"] for c in parsed for choice in c["choices"]]
    assert [reason for reason in reasons if reason] == ["length"]
    assert parsed[-1]["choices"] == []
    assert parsed[-1]["usage"]["completion_tokens"] == 4
    assert len({(c["id"], c["created"]) for c in parsed}) == 1


def test_every_choice_has_role_text_and_one_finish_reason() -> None:
    script = [Update([Delta(0, "a", 1), Delta(1, "b", 1)]), *words("c", index=1), *words("d")]
    with live(create_app(Settings(), serving(ScriptedEngine(script=script)))) as server:
        streamed = chat(server.url, n=2, stream=True)
        body = chat(server.url, n=2).json()
    texts = {0: "", 1: ""}
    finished: list[int] = []
    roles: list[int] = []
    for event in events(streamed.text)[:-1]:
        (choice,) = json.loads(event)["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        finished += [choice["index"]] if choice["finish_reason"] else []
        roles += [choice["index"]] if "role" in choice["delta"] else []
    assert texts == {0: "ad", 1: "bc"}
    assert sorted(finished) == [0, 1]
    assert sorted(roles) == [0, 1]
    assert [choice["message"]["content"] for choice in body["choices"]] == ["ad", "bc"]


@pytest.mark.parametrize("stream", [False, True])
def test_error_before_the_first_token_is_an_http_status(stream: bool) -> None:
    overloaded = Unavailable("Too much to do.", code="overloaded", retry_after_s=3)
    with live(create_app(Settings(), serving(ScriptedEngine(script=[overloaded])))) as server:
        answer = chat(server.url, stream=stream)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "3"
    assert answer.json()["error"]["code"] == "overloaded"


def test_error_in_a_started_stream_is_an_event_and_done_follows() -> None:
    script = [*words("Once upon")[:1], ServerFault()]
    script[0].deltas[0].finish_reason = None
    with live(create_app(Settings(), serving(ScriptedEngine(script=script)))) as server:
        answer = chat(server.url, stream=True)
    assert answer.status_code == 200
    *_, error, done = events(answer.text)
    assert json.loads(error)["error"]["type"] == "server_error"
    assert done == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_is_a_500_without_internals(stream: bool) -> None:
    engine = ScriptedEngine(script=[ZeroDivisionError("secret detail")])
    with live(create_app(Settings(), serving(engine))) as server:
        answer = chat(server.url, stream=stream)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    assert "Zero" not in answer.text


def test_a_bug_in_a_started_stream_ends_it_with_an_error_event() -> None:
    script = [Update([Delta(0, "Once", 1)]), ZeroDivisionError("secret detail")]
    with (
        live(create_app(Settings(), serving(ScriptedEngine(script=script)))) as server,
        RawClient(server.port) as client,
    ):
        client.post(CHAT, json.dumps({**ASK, "stream": True}).encode())
        received = client.read_until(b"data: [DONE]\n\n")
    assert b'"type":"server_error"' in received
    assert b"secret" not in received


def test_silence_is_filled_with_comments_and_then_the_answer_comes() -> None:
    wait = Wait()
    engine = ScriptedEngine(script=[wait, *words("late")])
    settings = Settings(ping_interval_s=0.1)
    with (
        live(create_app(settings, serving(engine))) as server,
        RawClient(server.port) as client,
    ):
        client.post(CHAT, json.dumps({**ASK, "stream": True}).encode())
        client.read_until(b": ping\n\n")
        assert b"HTTP/1.1 200" in client.received
        assert b"data:" not in client.received
        server.loop.call_soon_threadsafe(wait.go.set)
        assert b'"content":"late"' in client.read_until(b"data: [DONE]\n\n")


def test_error_after_a_comment_is_an_event() -> None:
    wait = Wait()
    engine = ScriptedEngine(script=[wait, ServerFault()])
    with (
        live(create_app(Settings(ping_interval_s=0.1), serving(engine))) as server,
        RawClient(server.port) as client,
    ):
        client.post(CHAT, json.dumps({**ASK, "stream": True}).encode())
        client.read_until(b": ping\n\n")
        server.loop.call_soon_threadsafe(wait.go.set)
        assert b'"type":"server_error"' in client.read_until(b"data: [DONE]\n\n")


def test_headers_say_what_was_not_done_as_asked() -> None:
    with live(create_app(Settings(), serving(ScriptedEngine()))) as server:
        answer = chat(server.url, max_tokens=500, foo=1, prediction={"type": "content"})
        plain = chat(server.url, max_tokens=5)
        odd = chat(server.url, **{"x\r\nset-cookie: a": 1, "é": 2})
        blank = [chat(server.url, **{name: 1}) for name in ("", " ", "x ", " x", "\t")]
    assert answer.headers["x-ochat-ignored"] == "foo, prediction"
    assert answer.headers["x-ochat-max-tokens"] == "96"
    assert "x-ochat-ignored" not in plain.headers
    assert "x-ochat-max-tokens" not in plain.headers
    assert odd.status_code == 200
    assert "set-cookie" not in odd.headers
    assert [answer.headers["x-ochat-ignored"] for answer in blank] == ["?", "?", "x?", "?x", "?"]


def test_strict_parameters_refuse_unknown_fields() -> None:
    settings = Settings(strict_parameters=True)
    with live(create_app(settings, serving(ScriptedEngine(), settings))) as server:
        answer = chat(server.url, foo=1)
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "Unrecognized request argument supplied: foo.",
        "type": "invalid_request_error",
        "param": "foo",
        "code": "unknown_parameter",
    }


@pytest.mark.parametrize("model", [None, "", "openchat_3.6", "openchat/openchat-3.6-8b-20240522"])
def test_model_names(model: str | None) -> None:
    with live(create_app(Settings(), serving(ScriptedEngine()))) as server:
        answer = chat(server.url, model=model)
    assert answer.json()["model"] == (model or "openchat_3.6")


def test_unknown_model_is_404_and_lists_what_is_served() -> None:
    with live(create_app(Settings(), serving(ScriptedEngine()))) as server:
        answer = chat(server.url, model="gpt-4")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert "openchat/openchat-3.6-8b-20240522" in error["message"]


def test_prompt_that_does_not_fit_names_both_numbers() -> None:
    long = {"messages": [{"role": "user", "content": "word " * 100}]}
    with live(create_app(Settings(), serving(ScriptedEngine()))) as server:
        answer = httpx.post(server.url + CHAT, json=long)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["message"].count("100 tokens") == 2


def test_request_id_is_the_clients_if_it_is_clean() -> None:
    with live(create_app(Settings(), serving(ScriptedEngine()))) as server:

        def returned(given: str) -> str:
            headers = {"x-request-id": given}
            return httpx.get(server.url + "/livez", headers=headers).headers["x-request-id"]

        assert returned("trace-1.a_B") == "trace-1.a_B"
        assert returned("x" * 129).startswith("req-")
        assert returned("a b").startswith("req-")


def test_first_token_is_not_held_back() -> None:
    wait = Wait()
    engine = ScriptedEngine(script=[Update([Delta(0, "first", 1)]), wait])
    with (
        live(create_app(Settings(), serving(engine))) as server,
        RawClient(server.port) as client,
    ):
        client.post(CHAT, json.dumps({**ASK, "stream": True}).encode())
        assert b'"content":"first"' in client.read_until(b"first")
        assert engine.running == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("begun", [True, False])
def test_a_client_that_hangs_up_frees_its_slot_within_a_second(stream: bool, begun: bool) -> None:
    script = [Update([Delta(0, "first", 1)])] if begun else []
    engine = ScriptedEngine(script=[*script, Wait()])
    with live(create_app(Settings(), serving(engine))) as server:
        with RawClient(server.port) as client:
            client.post(CHAT, json.dumps({**ASK, "stream": stream}).encode())
            assert eventually(lambda: engine.running == 1)
            if stream and begun:
                client.read_until(b"first")
        assert eventually(lambda: engine.running == 0, within_s=1)


@pytest.mark.parametrize("begun", [False, True])
def test_a_pipelined_request_does_not_keep_an_abandoned_one_alive(begun: bool) -> None:
    """Whether it comes with the first one or later."""
    engine = ScriptedEngine(script=[Wait()])
    with live(create_app(Settings(), serving(engine))) as server:
        with RawClient(server.port) as client:
            client.post(CHAT, json.dumps(ASK).encode())
            if begun:
                assert eventually(lambda: engine.running == 1)
            client.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert eventually(lambda: engine.running == 1)
            time.sleep(0.05)
        assert eventually(lambda: engine.running == 0, within_s=1)


def test_pipelined_requests_are_answered_in_turn_and_not_kept_in_any_number() -> None:
    wait = Wait()
    engine = ScriptedEngine(script=[wait, *words("late")])
    asked = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with live(create_app(Settings(), serving(engine))) as server:
        with RawClient(server.port) as client:
            client.post(CHAT, json.dumps(ASK).encode())
            assert eventually(lambda: engine.running == 1)
            for _ in range(100):
                client.send(asked)
            client.send(asked.replace(b"/livez", b"/version"))
            server.loop.call_soon_threadsafe(wait.go.set)
            received = client.read_until(b'"vllm"')
            assert received.index(b"late") < received.index(b"alive")
            assert received.count(b"200 OK") == 102
        with RawClient(server.port) as client:
            engine.script = [Wait()]
            client.post(CHAT, json.dumps(ASK).encode())
            assert eventually(lambda: engine.running == 1)
            with pytest.raises(OSError, match=r".*"):
                client.send(asked * 500_000)
            assert eventually(lambda: engine.running == 0)
