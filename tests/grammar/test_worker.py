"""The bounds of the process in which one grammar is tried, whatever goes on in there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile_grammars import COSTLY

ROOT = Path(__file__).parents[2]
# The judge does what the grammar says, as Python; forked from a process without threads.
PROGRAM = """
import json, sys
from ochat_serve.grammar import worker

class Judge:
    def judge(self, kind, text, patterns):
        exec(text)

worker.CPU_S, worker.WALL_S = 1, float(sys.argv[2])
grammar = {"kind": "regex", "text": sys.argv[1], "patterns": []}
print(json.dumps(worker.tried(Judge(), grammar)))
"""


def tried(text: str, wall_s: float = 60) -> str | None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, text, str(wall_s)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    (line,) = done.stdout.splitlines()  # and no second process goes on
    return json.loads(line)


@pytest.mark.parametrize(
    "text",
    [
        "while True: pass",
        "bytearray(2 << 30)",
        "[].append([0] * (1 << 28))",
        "import os; os.abort()",
        "import os; os._exit(0)",
        "raise KeyError('what no line of the worker names')",
        "raise RuntimeError('')",
    ],
)
def test_what_a_bound_or_a_crash_ends_is_too_costly(text: str) -> None:
    assert COSTLY in tried(text)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("pass", ""),
        ("raise RuntimeError('[13:59:43] /a/b.cc:83: Bad at 3.\\n')", "Bad at 3."),
        ("raise ValueError('no')", "no"),
        ("raise ValueError('x' * 100_000)", "x" * 4096),
    ],
)
def test_what_is_said_arrives(text: str, verdict: str) -> None:
    assert tried(text) == verdict


def test_who_gets_no_processor_knows_nothing() -> None:
    assert tried("import time; time.sleep(60)", wall_s=0.2) is None
