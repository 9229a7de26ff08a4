"""The process behind the trial of grammars, seen from the server: started when it is first needed,
killed when it does not answer in time, and then started again for the next one."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
START_S = 120  # imports, and the vocabulary is read
# The worker keeps a bound of its own, which is shorter; this is for a worker that is lost.
ANSWER_S = 30


class TrialLost(Exception):
    """The process ended or could not tell in time: nothing is known of the grammar."""


@dataclass
class Trial:
    """Tries grammars out for one tokenizer.  ``options`` are ``from_pretrained``'s;
    ``compact_json`` is how the engine writes JSON.  Blocks, and serves one thread at a time."""

    tokenizer: str
    vocab_size: int
    compact_json: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    command: Sequence[str] = (sys.executable, "-P", str(WORKER))
    start_s: float = START_S
    answer_s: float = ANSWER_S
    _process: "subprocess.Popen[str] | None" = None

    def verdict(self, kind: str, text: str, patterns: Sequence[str] = ()) -> str:
        """What is wrong with a grammar, "" for nothing.  Raises ``TrialLost``."""
        if self._process is None:
            self._start()
        grammar = {"kind": kind, "text": text, "patterns": [*patterns]}
        answer: str | None = json.loads(self._exchange(grammar, self.answer_s))
        if answer is None:
            raise TrialLost
        return answer

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # the memory there is the engine's
            encoding="utf-8",
        )
        start = {
            "tokenizer": self.tokenizer,
            "options": dict(self.options),
            "vocab_size": self.vocab_size,
            "compact_json": self.compact_json,
        }
        self._exchange(start, self.start_s)

    def _exchange(self, request: Mapping[str, Any], timeout_s: float) -> str:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = threading.Timer(timeout_s, process.kill)
        deadline.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        finally:
            deadline.cancel()
        if not line:
            self.close()
            raise TrialLost
        return line

    def kill(self) -> None:
        """From any thread: whoever waits for the process has a lost trial."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process; the next grammar starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with process:  # closes its pipes and waits for its end
                pass
