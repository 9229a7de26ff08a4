"""The real process that tries grammars out, with the demo model's tokenizer."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ochat_serve.grammar import Trial
from ochat_serve.grammar.trial import TrialLost
from tests.hostile_grammars import COSTLY, NO_ANSWER, SLOW, rules

GOOD = [
    ("json", '{"type":"object"}'),
    ("json", "{}"),
    ("json", '{"type":"array","items":{"type":"number"},"minItems":2}'),
    ("json", '{"anyOf":[{"type":"null"},{"type":"array","items":{"$ref":"#"}}]}'),
    ("regex", r"[a-z0-9._]+@[a-z0-9]+(\.[a-z]{2,4})+"),
    ("regex", r"((25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(25[0-5]|2[0-4]\d|1?\d?\d)"),
    ("regex", r"(\d+,)*\d+"),
    ("grammar", 'root ::= e\ne ::= t ("+" t)*\nt ::= [0-9]+ | "(" e ")"'),
    ("grammar", 'root ::= "é" | "日本"'),
    ("choice", 'root ::= "yes" | "no"'),
]
BAD = [
    ("grammar", 'root ::= "a" | root root', COSTLY),
    ("grammar", 'root ::= [a-z]{5000} s\ns ::= "a" | s s | s s s', COSTLY),
    ("grammar", rules(40), COSTLY),
    ("regex", SLOW, COSTLY),
    ("regex", r"[^\s\S]", NO_ANSWER),
    ("json", '{"$ref":"#"}', NO_ANSWER),
    ("regex", "((((", "The parenthesis is not closed"),
    ("grammar", "root ::= foo", 'Rule "foo" is not defined'),
    ("json", '{"type":"strin"}', 'Unsupported type "strin"'),
    ("grammar", "\n".join(f'r{n} ::= "a"' for n in range(300)) + "\nroot ::= r0", "256 rules"),
]
# Stands in for the worker: says it is ready, then does what it is told.
READY = "import sys, time; input(); print('ready', flush=True); input(); "


@pytest.fixture(scope="module")
def trial(demo_folder: Path) -> Iterator[Trial]:
    made = Trial(str(demo_folder), vocab_size=49152, compact_json=True)
    yield made
    made.close()


@pytest.mark.parametrize(("kind", "text"), GOOD)
def test_good_ones_pass(trial: Trial, kind: str, text: str) -> None:
    assert trial.verdict(kind, text) == ""


@pytest.mark.parametrize(("kind", "text", "reason"), BAD)
def test_bad_ones_do_not_and_the_process_lives_on(
    trial: Trial, kind: str, text: str, reason: str
) -> None:
    trial.verdict("regex", "a")
    process = trial._process
    verdict = trial.verdict(kind, text)
    assert reason in verdict
    assert "project" not in verdict, "no file of the compiler's"
    assert "\n" not in verdict
    assert trial.verdict("regex", "a") == ""
    assert trial._process is process


def test_patterns_of_a_schema_are_walked_through_as_well(trial: Trial) -> None:
    """Here the pattern lies behind a string, which a walk may never leave."""
    schema = (
        '{"type":"object","properties":{"a":{"type":"string","minLength":5000},'
        f'"b":{{"type":"string","pattern":"{SLOW}"}}}},"required":["a","b"]}}'
    )
    assert COSTLY in trial.verdict("json", schema, [SLOW])


def test_nothing_is_left_of_a_trial(trial: Trial) -> None:
    trial.verdict("regex", SLOW)
    assert psutil.Process(trial._process.pid).children() == []


def test_a_killed_process_is_started_again(trial: Trial) -> None:
    trial.verdict("regex", "a")
    os.kill(trial._process.pid, signal.SIGKILL)
    with pytest.raises(TrialLost):
        trial.verdict("regex", "b")
    assert trial.verdict("regex", "b") == ""


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit",
        READY + "raise SystemExit",
        READY + "time.sleep(1000)",
        "input(); input()",
    ],
)
def test_a_process_that_does_not_answer_is_lost(program: str) -> None:
    trial = Trial("x", 1, True, command=(sys.executable, "-c", program), start_s=5, answer_s=0.2)
    if program == "input(); input()":
        trial.start_s = 0.2
    with pytest.raises(TrialLost):
        trial.verdict("regex", "a")
    assert trial._process is None


def test_a_process_that_could_not_tell_goes_on() -> None:
    program = READY + "print('null', flush=True); input(); print('\"\"', flush=True); input()"
    trial = Trial("x", 1, True, command=(sys.executable, "-c", program))
    with pytest.raises(TrialLost):
        trial.verdict("regex", "a")
    assert trial.verdict("regex", "a") == ""
    trial.close()


def test_what_nobody_expected_is_no_second_worker(trial: Trial) -> None:
    """The pattern is none: an error that no line of the worker names."""
    assert trial.verdict("json", "{}", [["no pattern"]])
    assert trial.verdict("regex", "a") == ""
    assert psutil.Process(trial._process.pid).children() == []


def test_the_process_ends_with_its_owner(demo_folder: Path) -> None:
    """Its input ends, and nothing else tells it."""
    trial = Trial(str(demo_folder), vocab_size=49152, compact_json=True)
    trial.verdict("regex", "a")
    process = trial._process
    process.stdin.close()
    assert process.wait(20) == 0
    trial.close()
