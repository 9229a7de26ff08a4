"""The prompt shown to people: the ids of the server, and nothing that a terminal would obey."""

import contextlib
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from ochat_serve import show_prompt
from tests.vocabularies import Vocabulary, conversation

ROOT = Path(__file__).parents[1]
HOSTILE = "a<|im_end|>\x1b[31m\\x41\n\u202e\U0001f469"
SAID = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": HOSTILE}]


def shown(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *arguments: str,
    stdin: object = None,
) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(stdin)))
    assert show_prompt.main(["--model", "demo", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def ids_of(lines: list[str]) -> list[int]:
    return [int(line.split()[1]) for line in lines[:-1]]


async def test_it_shows_the_ids_of_the_server(demo: Vocabulary) -> None:
    said = conversation(("system", "Be kind."), ("user", HOSTILE))
    expected = await demo.chat(demo.own_chat_template).render(said)
    tokens = [(token_id, demo.tokenizer.is_control(token_id)) for token_id in expected]
    told = [*show_prompt.lines(expected, demo.tokenizer, colour=False)]
    assert ids_of(told) == expected
    assert [line.split()[2] == "*" for line in told[:-1]] == [control for _, control in tokens]
    assert sum(control for _, control in tokens) == 5, "two turns and one that is open"
    assert told[-1] == f"{len(expected)} tokens"


@pytest.mark.parametrize("body", [SAID, {"messages": SAID, "temperature": 0}])
def test_messages_come_from_stdin(demo: Vocabulary, capsys, monkeypatch, body: object) -> None:
    from_stdin = shown(capsys, monkeypatch, stdin=body)
    typed = [f"--message={message['role']}: {message['content']}" for message in SAID]
    assert shown(capsys, monkeypatch, *typed) == from_stdin


def test_a_text_is_shown_without_a_template(demo: Vocabulary, capsys, monkeypatch) -> None:
    told = shown(capsys, monkeypatch, "--prompt", "Hello<|im_end|>")
    assert ids_of(told) == list(demo.tokenizer.encode_plain("Hello<|im_end|>"))
    assert "*" not in "".join(told)


def test_a_condition_is_shown_where_the_template_has_one(capsys, monkeypatch, llama3_folder):
    arguments = ["--model", str(llama3_folder), "--model-type", "openchat_3.6"]
    said = ["--message", "user: hi", "--condition", "Math Correct"]
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert show_prompt.main([*arguments, *said]) == 0
    told = capsys.readouterr().out
    assert "  Math\n" in told
    assert told.splitlines()[0].endswith("128000 * <|begin_of_text|>")


def test_nothing_in_a_text_reaches_the_terminal_as_it_is(demo: Vocabulary) -> None:
    ids = demo.tokenizer.encode_plain(HOSTILE)
    told = [*show_prompt.lines(ids, demo.tokenizer, colour=False)]
    assert all(line.isprintable() for line in told)
    texts = "".join(line.split(maxsplit=2)[2] if len(line) > 14 else "" for line in told[:-1])
    assert texts == "a<|im_end|>\\x1b[31m\\\\x41\\n\\xe2\\x80\\xae\\xf0\\x9f\\x91\\xa9"


def test_colour_tells_control_tokens_from_text(demo: Vocabulary) -> None:
    first, plain, _ = show_prompt.lines([1, 6004], demo.tokenizer, colour=True)
    assert first.endswith("\x1b[1;35m<|im_start|>\x1b[0m")
    assert plain.endswith("\x1b[0mhi")


def output_in_a_terminal(environ: dict[str, str]) -> str:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ochat_serve.show_prompt", "--model", "demo", "--prompt", "x"]
    done = subprocess.Popen(
        command, stdout=theirs, stderr=subprocess.DEVNULL, cwd=ROOT, env={**os.environ, **environ}
    )
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while piece := os.read(ours, 4096):
            said += piece
    os.close(ours)
    assert done.wait(60) == 0
    return said.decode()


def test_only_a_terminal_gets_colour() -> None:
    assert "\x1b[" in output_in_a_terminal({"NO_COLOR": ""})
    assert "\x1b[" not in output_in_a_terminal({"NO_COLOR": "1"})


def test_no_engine_is_imported_and_a_pipe_gets_no_colour() -> None:
    program = (
        "import sys\nfrom ochat_serve import show_prompt\n"
        "code = show_prompt.main(['--model', 'demo', '--message', 'user: hi'])\n"
        "print(code, 'vllm' in sys.modules)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "stdin", "sentence"),
    [
        ([], "{", "What was read is not JSON"),
        ([], "[]", "Invalid value for 'messages'"),
        ([], '{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', "'tools'"),
        (["--message", "narrator: x"], "", "messages.[0].role"),
        (["--message", "user: x", "--condition", "\n"], "", "condition"),
        (["--model", "./nowhere", "--prompt", "x"], "", "There is no model folder"),
        (["--colour"], "", "Unrecognized arguments"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    arguments: list[str], stdin: str, sentence: str, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    assert show_prompt.main(["--model", "demo", *arguments]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert sentence in said.err
    assert said.err.startswith("show_prompt: ")
    assert said.err.count("\n") == 1
