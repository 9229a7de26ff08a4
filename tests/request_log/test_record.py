"""A record and its line: what is left out, cut and edited, and what became of the request."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from ochat_serve.caller import Caller, LogContent
from ochat_serve.generation import Usage
from ochat_serve.request_log import Outcome, RequestRecord, outcome_of
from ochat_serve.request_log.record import KEPT_CHARS, cut
from ochat_serve.settings import Settings
from tests.request_log.files import lines, record, request_log

LONG = "x" * KEPT_CHARS
BODY = {"messages": [{"role": "user", "content": LONG + "yz"}, {"content": [{"text": LONG}]}]}


def shown(record: RequestRecord, **edit: Any) -> dict[str, Any]:
    line = record.line(**edit)
    assert "\n" not in line
    return json.loads(line)


def test_what_is_not_known_is_left_out():
    assert shown(record()) == {
        "time": 1.5,
        "request_id": "req-1",
        "method": "POST",
        "path": "/v1/x",
    }


def test_all_that_can_be_known():
    known = {
        "id": "chatcmpl-1",
        "client": "::1",
        "key": "key-1",
        "model": "m",
        "user": "u",
        "metadata": {"k": "v"},
        "parameters": {"n": 2},
        "finish_reasons": ["stop", None],
        "status": 200,
        "outcome": "finished",
        "error": "overloaded",
        "outputs": ["Hi"],
    }
    whole = record(
        **known,
        request='{"messages": []}',
        usage=Usage(9, 4, 8),
        time=1_700_000_000.12345,
        queue_s=0.0625,
        first_token_s=0.12345,
        total_s=0.0,
    )
    assert shown(whole) == known | {
        "time": 1_700_000_000.123,
        "request_id": "req-1",
        "method": "POST",
        "path": "/v1/x",
        "prompt_tokens": 9,
        "completion_tokens": 4,
        "cached_tokens": 8,
        "queue_s": 0.062,
        "first_token_s": 0.123,
        "total_s": 0.0,
        "request": {"messages": []},
    }


@pytest.mark.parametrize(
    "value", ["a\nb\r\n", "\0", '"\\', "\u2028\x85", "你好 👩‍🚀", "%s %d {}", "\ud800"]
)
def test_a_record_is_one_line(tmp_path: Path, value: str):
    path = tmp_path / "log"
    log = request_log(path)
    log.write(record(user=value, outputs=[value]))
    log.write(record())
    log.close()
    first, second = lines(path)
    assert (first["user"], first["outputs"]) == (value, [value])
    assert second == json.loads(record().line())


def said(content: LogContent) -> dict[str, Any]:
    return shown(record(content=content, request=json.dumps(BODY), outputs=["ok", LONG + "y" * 9]))


def test_all_of_what_was_said():
    assert said("full")["request"] == BODY
    assert said("full")["outputs"] == ["ok", LONG + "y" * 9]


def test_the_beginnings_of_what_was_said():
    """Every text at any depth, and how much is missing; what is short enough stays as it is."""
    line = said("truncated")
    first, second = line["request"]["messages"]
    assert first == {"role": "user", "content": f"{LONG}… [2 more characters]"}
    assert second == {"content": [{"text": LONG}]}
    assert line["outputs"] == ["ok", f"{LONG}… [9 more characters]"]


def test_names_of_fields_are_texts_too():
    body = json.dumps({LONG + "yz": 1})
    assert list(shown(record(content="truncated", request=body))["request"]) == [cut(LONG + "yz")]


def test_a_users_name_is_not_cut():
    line = shown(record(content="truncated", user=LONG + "y", metadata={"k": LONG + "y"}))
    assert (line["user"], line["metadata"]) == (LONG + "y", {"k": LONG + "y"})


def test_edited_everywhere_and_before_the_cut():
    """Half a secret at the cut would not be found."""
    secret = "s3cret"
    text = "x" * (KEPT_CHARS - 3) + secret
    line = shown(
        record(
            content="truncated",
            path=f"/v1/{secret}",
            user=secret,
            metadata={secret: secret},
            request=json.dumps({"messages": [{"content": [{"text": text}], secret: 1}]}),
            outputs=[text],
        ),
        redact=lambda text: text.replace(secret, "-"),
    )
    assert "s3" not in json.dumps(line)
    assert (line["path"], line["user"], line["metadata"]) == ("/v1/-", "-", {"-": "-"})
    assert line["outputs"] == ["x" * (KEPT_CHARS - 3) + "-"]
    assert line["request"] == {"messages": [{"content": [{"text": line["outputs"][0]}], "-": 1}]}


@pytest.mark.parametrize(
    ("servers", "keys", "level"),
    [
        ("none", None, "none"),
        ("none", "full", "full"),
        ("full", None, "full"),
        ("full", "none", "none"),
        ("full", "truncated", "truncated"),
        (None, "full", None),  # there is no log
    ],
)
def test_a_keys_own_level_wins(servers: Any, keys: Any, level: Any):
    known = record(content=servers)
    known.sent_by(Caller("anna", log_content=keys))
    assert (known.key, known.content) == ("anna", level)
    assert known.keeps_content is (level in ("truncated", "full"))


def test_server_and_keys_have_the_same_levels():
    assert Settings.model_fields["log_content"].annotation == LogContent


def test_weight_follows_what_is_held():
    light = record().weight
    heavy = record(request="x" * 1_000, outputs=["y" * 500, "z" * 70], metadata={"k": "v" * 30})
    assert light > 0
    assert heavy.weight == light + 1_600


@pytest.mark.parametrize(
    ("status", "error", "outcome"),
    [
        (200, None, "finished"),
        (200, "server_error", "failed"),
        (200, "engine_dead", "failed"),
        (200, "deadline_exceeded", "timeout"),
        (503, "queue_timeout", "timeout"),
        (200, "shutting_down", "shutdown"),
        (400, "invalid_value", "rejected"),
        (401, "invalid_api_key", "rejected"),
        (404, None, "rejected"),
        (408, None, "timeout"),
        (429, "rate_limit_exceeded", "rejected"),
        (500, "unexpected", "failed"),
        (503, "loading", "rejected"),
        (503, "overloaded", "rejected"),
        (503, "engine_dead", "failed"),
        (504, "anything", "timeout"),
        (None, None, "failed"),
        (None, "unexpected", "failed"),
    ],
)
def test_what_became_of_it(status: int | None, error: str | None, outcome: Outcome):
    assert outcome_of(status, error) == outcome
    assert outcome in get_args(Outcome)
