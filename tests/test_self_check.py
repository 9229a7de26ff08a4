"""The question at start: what is asked of whom, what is a right answer, and what becomes of a
server whose model gives another."""

import asyncio
import contextlib
import json
import selectors
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from ochat_serve.errors import StartupError, Unavailable
from ochat_serve.generation import ChatTurn, Conversation, Update
from ochat_serve.loader import CHECKING
from ochat_serve.self_check import (
    CACHE_SALT,
    CAPITAL,
    KNOWN_ANSWERS,
    MAX_TOKENS,
    check,
    expected_answer,
)
from ochat_serve.setting_values import DEMO
from ochat_serve.templates.registry import TEMPLATES
from tests.fakes import ScriptedEngine, Wait, WordPrompts, served, words
from tests.live import eventually
from tests.process import ServerProcess

ASKED = "The self-check failed: asked 'What is the capital of France?', "
LOOK_AT = (
    "Look at --enforce-eager, --dtype, --quantization and --model-type; with --self-check off it "
    "is served all the same."
)
PATIENCE_S = 60
# What compiled bfloat16 has the demo model say on a CPU.
GARBAGE = "L'Étoile, la Marseillaise, la femme, la femme au martyre, la femme au martyre, la femme"


def asked(script: Sequence[Update | Exception | Wait], engine: ScriptedEngine | None = None) -> str:
    engine = engine or ScriptedEngine()
    engine.script = script
    return asyncio.run(check(served(engine), CAPITAL, PATIENCE_S))


def refusal(
    script: Sequence[Update | Exception | Wait], engine: ScriptedEngine | None = None
) -> str:
    with pytest.raises(StartupError) as stopped:
        asked(script, engine)
    return str(stopped.value)


@pytest.mark.parametrize(
    "answer",
    ["The capital of France is Paris.", "Paris", "**Paris**", " PARIS!\n", "It's Paris, not Lyon."],
)
def test_a_right_answer_is_told(answer: str) -> None:
    assert asked(words(*answer.partition("a"))) == answer.strip()


def test_a_right_answer_may_go_on() -> None:
    """Some models are never short."""
    answer = "Paris is the capital of France. The city lies on the river Seine and is known for"
    assert asked(words(answer, finish="length")) == answer


@pytest.mark.parametrize(
    "answer",
    [
        GARBAGE,
        "",
        "!!!!!!!!!!!!!!!!",
        "The capital of France is Lyon.",
        "Comparison",
        "Paris " * 8,
        "the Paris the Paris of the of the Paris the of the",
    ],
)
def test_a_wrong_answer_is_quoted_with_the_switches_to_look_at(answer: str) -> None:
    said = refusal(words(answer))
    assert said == f"{ASKED}the model says {answer.strip()!r} and not 'Paris'. {LOOK_AT}"


def test_what_a_model_says_cannot_take_over_a_terminal() -> None:
    said = refusal(words("\x1b[2J\n\x9b31m\u202e", "x" * 10_000))
    assert said.isprintable()
    assert len(said) < 500


def test_an_engine_that_fails() -> None:
    error = Unavailable("It was given up.", code="engine_failed", retry_after_s=1)
    assert refusal([error]) == f"{ASKED}the engine failed: It was given up."
    refusing = ScriptedEngine(refuses=error)
    assert refusal([], refusing) == f"{ASKED}the engine failed: It was given up."
    dead = ScriptedEngine(failure="The engine process has died (killed by SIGKILL).")
    assert refusal([error], dead) == f"{ASKED}the engine failed: {dead.failure}"


def test_it_is_asked_as_anybody_asks_but_belongs_to_nobody() -> None:
    rendered: list[tuple[object, ...]] = []

    class Prompts(WordPrompts):
        async def render(self, *arguments: object) -> list[int]:
            rendered.append(arguments)
            return [1, 2]

    engine = ScriptedEngine(words("Paris"))
    asyncio.run(check(served(engine, Prompts(stop_token_ids=(7, 8))), CAPITAL, PATIENCE_S))
    question = Conversation((ChatTurn("user", CAPITAL.question),))
    assert rendered == [(question, engine.info.max_model_len, CACHE_SALT)]
    ((prompt, options),) = engine.requests
    assert (prompt, engine.cache_salts) == ([1, 2], [CACHE_SALT])
    assert (options.temperature, options.max_tokens) == (0, MAX_TOKENS)
    assert options.stop_token_ids == (7, 8)
    assert engine.running == 0


class JumpingLoop(asyncio.SelectorEventLoop):
    """Where nothing is left to do but wait, the time has come already."""

    def __init__(self) -> None:
        self.now_s = 0.0
        loop = self

        class Selector(selectors.SelectSelector):
            def select(self, timeout: float | None = None) -> list:
                loop.now_s += timeout or 0
                return super().select(0)

        super().__init__(Selector())

    def time(self) -> float:
        return self.now_s


def ask_slow(engine: ScriptedEngine, silence_s: float, then: Sequence[Update]) -> float:
    """It makes each token of ``then`` after ``silence_s``: the seconds it took.  Raises
    ``StartupError``."""

    async def run() -> float:
        waits = [Wait() for _ in then]
        loop = asyncio.get_running_loop()
        for number, wait in enumerate(waits, 1):
            loop.call_at(number * silence_s, wait.go.set)
        engine.script = [step for pair in zip(waits, then, strict=True) for step in pair]
        await check(served(engine), CAPITAL, PATIENCE_S)
        return loop.time()

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(run())


def test_a_slow_engine_is_waited_for() -> None:
    """It counts how long it says nothing, not how long its answer takes."""
    slow = words("The", " capital", " is", " Paris")
    assert ask_slow(ScriptedEngine(), 0.9 * PATIENCE_S, slow) > 3 * PATIENCE_S


def test_an_engine_that_hangs_is_not() -> None:
    engine = ScriptedEngine()
    with pytest.raises(StartupError) as stopped:
        ask_slow(engine, 1.1 * PATIENCE_S, words("Paris"))
    assert engine.running == 0
    assert str(stopped.value) == (
        f"{ASKED}the engine made no token in 60 seconds. If the machine is that slow, --stall-s "
        "must be longer; --self-check off does not ask."
    )


@pytest.mark.parametrize(
    ("model", "known"),
    [
        (DEMO, True),
        ("openchat/openchat-3.6-8b-20240522", True),
        ("somebody/openchat-3.6-8b-20240522-AWQ", True),
        ("openchat/openchat_3.5", True),
        ("openchat/openchat-3.5-0106", True),
        ("openchat/openchat-3.5-0106-gemma", True),
        ("openchat/openchat_v3.2_super", True),
        ("./models/openchat-3.6-8b-20240522/", True),
        ("./demo", False),
        ("./gemma", False),
        ("./trained-further", False),
        ("openchat-3.6/checkpoint-100", False),
        ("meta-llama/Meta-Llama-3-8B-Instruct", False),
    ],
)
def test_whom_auto_asks(model: str, known: bool) -> None:
    assert expected_answer("auto", model, has_weights=True) == (CAPITAL if known else None)
    assert expected_answer("auto", model, has_weights=False) is None, "what it says is made up"
    for has_weights in (True, False):
        assert expected_answer("on", model, has_weights=has_weights) == CAPITAL
        assert expected_answer("off", model, has_weights=has_weights) is None


def test_every_openchat_type_has_a_known_answer() -> None:
    types = {template.name for template in TEMPLATES.values() if template.is_openchat}
    assert KNOWN_ANSWERS.keys() == {DEMO, *types}


# The whole server, with a scripted engine.


@contextlib.contextmanager
def start(folder: Path, *arguments: str) -> Iterator[ServerProcess]:
    """With ``--log-file requests.log`` in the folder."""
    server = ServerProcess(
        *arguments,
        "--log-file",
        str(folder / "requests.log"),
        output=folder / "output.txt",
        module="tests.checked_server",
    )
    try:
        yield server
    finally:
        server.end()


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "requests.log").read_text().splitlines()]


def test_a_model_that_knows_it_is_served(tmp_path: Path) -> None:
    with start(tmp_path, "--says", "It's| Paris.", "--model", "demo") as server:
        server.wait_until_ready()
        said = server.output
        assert server.stop() == 0
    answer = "asked 'What is the capital of France?', the model says \"It's Paris.\"\n"
    assert f"ochat_serve: {answer}ochat_serve: ready in " in said
    assert lines(tmp_path) == [], "it is nobody's request"


def test_a_model_that_does_not_is_not(tmp_path: Path) -> None:
    with start(tmp_path, "--says", GARBAGE, "--model", "demo") as server:
        assert server.process.wait(30) == 1
    *_, end, last = server.output.strip().splitlines()
    assert end == "ochat_serve: the engine is closed", "it must not have the last word"
    assert last == f"ochat_serve: {ASKED}the model says \"{GARBAGE}\" and not 'Paris'. {LOOK_AT}"
    assert "Traceback" not in server.output
    assert "ready in" not in server.output


@pytest.mark.parametrize(
    "arguments", [("--model", "demo", "--self-check", "off"), ("--model", "./trained-further")]
)
def test_it_is_served_all_the_same_where_nothing_is_asked(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    with start(tmp_path, "--says", GARBAGE, *arguments) as server:
        server.wait_until_ready()
        assert server.stop() == 0
    assert "asked" not in server.output


def is_checking(server: ServerProcess) -> bool:
    return httpx.get(server.url + "/readyz").json()["phase"] == CHECKING


@pytest.mark.parametrize("engine", ["silent", "failing", "hung"])
def test_while_it_is_asked_the_server_is_not_ready(tmp_path: Path, engine: str) -> None:
    """And a signal ends it, as it does while the model loads, whatever the engine does then."""
    with start(tmp_path, "--self-check", "--engine", engine) as server:
        server.wait_until_answering()
        assert eventually(lambda: is_checking(server))
        ready = httpx.get(server.url + "/readyz")
        chat = httpx.post(server.url + "/v1/chat/completions", json={"messages": []})
        assert httpx.get(server.url + "/livez").status_code == 200
        assert server.stop(signal.SIGTERM) == 0
    assert (ready.status_code, ready.json()["status"]) == (503, "loading")
    assert f"({CHECKING})" in ready.json()["reason"]
    assert (chat.status_code, chat.json()["error"]["code"]) == (503, "loading")
    assert "Traceback" not in server.output


@pytest.mark.parametrize("engine", ["silent", "hung"])
def test_an_engine_that_says_nothing_ends_the_start(tmp_path: Path, engine: str) -> None:
    with start(tmp_path, "--self-check", "--stall-s", "0.5", "--engine", engine) as server:
        assert server.process.wait(30) == 1
    *_, last = server.output.strip().splitlines()
    assert last.startswith(f"ochat_serve: {ASKED}the engine made no token in 0.5 seconds.")
    assert server.output.count("self-check failed") == 1


def test_an_engine_that_must_be_killed_at_the_end_is_no_failure(tmp_path: Path) -> None:
    """The server has looked for dead engines all the while; now it has told this one to end."""
    with start(tmp_path, "--self-check", "off", "--engine", "slow") as server:
        server.wait_until_ready()
        assert server.stop(signal.SIGTERM) == 0
    assert "has died" not in server.output
