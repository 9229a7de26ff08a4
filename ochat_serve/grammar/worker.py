"""The process that tries grammars out.  It is run as a script and imports nothing of ours.

One line of JSON comes in, one goes out.  The first says which tokenizer; each of the others is a
grammar, which is compiled as the engine would do it and then walked through, in a process forked
for it alone: whatever that costs or breaks ends with it, and the next one begins as fresh as the
first.  Walking matters as much as compiling: the engine computes the allowed tokens between two
steps, and forty characters of grammar can make that take minutes for everybody.
"""

import json
import os
import random
import re
import resource
import select
import signal
import sys
import time
from typing import Any, TextIO

CPU_S = 4  # for one grammar; an honest one takes a tenth of a second
WALL_S = 15  # where others have the processors
DATA_BYTES = 1 << 30  # on top of what the tokenizer takes
ROOT_STEPS = 256  # tokens of one walk
RULE_STEPS = 128
CANDIDATES = 4  # what is slow grows with the length: the longest of so many tokens goes on
ROOT_WALKS = 3
MAX_RULES = 256
# Of one step of the engine, which takes some ten milliseconds, this is for one request.
MAX_STEP_S = 0.005
MAX_ONE_STEP_S = 0.1  # masks are made when they are first needed
TOO_COSTLY = "it takes more time or memory than this server allows"


class Refused(Exception):
    """The grammar is not one to serve."""


class Walker:
    """Goes through grammars as a model without sense would, token by token."""

    def __init__(self, xgrammar: Any, tokenizer_info: Any) -> None:
        self._xgrammar = xgrammar
        self._stops = [*tokenizer_info.stop_token_ids]
        self._lengths = [len(word) for word in tokenizer_info.decoded_vocab]
        self._mask = xgrammar.allocate_token_bitmask(1, tokenizer_info.vocab_size)
        self._bytes = self._mask[0].numpy().view("uint8")

    def walk(self, compiled: Any, seed: int, steps: int) -> bool:
        """Up to ``steps`` tokens, ending only where nothing else is allowed.  Whether it could go
        on at every point.  Raises ``Refused`` for steps that take too long."""
        matcher = self._xgrammar.GrammarMatcher(compiled)
        choose = random.Random(seed)
        spent = 0.0
        for step in range(1, steps + 1):
            began = time.thread_time()
            matcher.fill_next_token_bitmask(self._mask)
            took = time.thread_time() - began
            token, may_end = self._choose(choose)
            if token is None:
                return may_end
            began = time.thread_time()
            accepted = matcher.accept_token(token)
            took += time.thread_time() - began
            spent += took
            if took > MAX_ONE_STEP_S or (step >= 8 and spent > step * MAX_STEP_S):
                raise Refused(TOO_COSTLY)
            if not accepted:
                return False
        return True

    def _choose(self, choose: random.Random) -> tuple[int | None, bool]:
        """An allowed token that does not end the answer; and whether it might end here."""
        may_end = False
        for stop in self._stops:
            bit = 1 << stop % 8
            may_end = may_end or bool(self._bytes[stop // 8] & bit)
            self._bytes[stop // 8] &= 0xFF ^ bit
        places = self._bytes.nonzero()[0]
        if not len(places):
            return None, may_end
        candidates = (self._one_of(places, choose) for _ in range(CANDIDATES))
        return max(candidates, key=self._lengths.__getitem__), may_end

    def _one_of(self, places: Any, choose: random.Random) -> int:
        place = int(places[choose.randrange(len(places))])
        value = int(self._bytes[place])
        return place * 8 + choose.choice([bit for bit in range(8) if value >> bit & 1])


class Judge:
    """Compiles a grammar as the engine does, and has it walked through."""

    def __init__(self, xgrammar: Any, tokenizer_info: Any, compact_json: bool) -> None:
        self._xgrammar = xgrammar
        self._walker = Walker(xgrammar, tokenizer_info)
        self._json_options = {
            "any_whitespace": not compact_json,
            "separators": (",", ":") if compact_json else None,
        }
        # The engine's has more threads and a cache; the work is the same.
        self._compiler = xgrammar.GrammarCompiler(
            tokenizer_info, max_threads=1, cache_enabled=False
        )

    def judge(self, kind: str, text: str, patterns: list[str]) -> None:
        """Raises ``Refused``, or what xgrammar raises."""
        if kind == "json":
            for pattern in patterns:
                self._every_rule(str(self._xgrammar.Grammar.from_regex(pattern)))
            compiled = self._compiler.compile_json_schema(text, **self._json_options)
        elif kind == "regex":
            self._every_rule(str(self._xgrammar.Grammar.from_regex(text)))
            compiled = self._compiler.compile_regex(text)
        else:
            if kind == "grammar":  # and not made by us
                self._every_rule(str(self._xgrammar.Grammar.from_ebnf(text)))
            compiled = self._compiler.compile_grammar(text)
        for seed in range(ROOT_WALKS):
            if not self._walker.walk(compiled, seed, ROOT_STEPS):
                raise Refused("it can come to a point where no answer fits")

    def _every_rule(self, rules: str) -> None:
        """Walk through each rule as if it were the first: a costly one may lie far behind."""
        names = re.findall(r"^(\w+)[^\n]*? ::=", rules, re.MULTILINE)
        if len(names) > MAX_RULES:
            raise Refused(f"it has more than {MAX_RULES} rules")
        for name in names:
            compiled = self._compiler.compile_grammar(rules, root_rule_name=name)
            self._walker.walk(compiled, 0, RULE_STEPS)


def tried(judge: Judge, grammar: dict[str, Any]) -> str | None:
    """What is wrong with a grammar, "" for nothing: found out in a process of its own.  None where
    that process did not get the processor time that it may use."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            _bounded()
            os.write(writing, _verdict(judge, grammar).encode("utf-8", "replace")[:4096])
        finally:
            os._exit(0)  # whatever happens: it must not go on as a second worker
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], WALL_S)
    verdict = os.read(reading, 4096).decode("utf-8", "replace") if ready else None
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    # A process that has said nothing was ended by one of its bounds.
    return TOO_COSTLY if verdict == "" else verdict and verdict.removeprefix("good")


def _bounded() -> None:
    with open("/proc/self/status") as status:
        used = next(line for line in status if line.startswith("VmData:"))
    most = int(used.split()[1]) * 1024 + DATA_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _verdict(judge: Judge, grammar: dict[str, Any]) -> str:
    try:
        judge.judge(**grammar)
    except (Refused, RuntimeError, ValueError, TypeError) as error:
        # xgrammar says when, and in which of its files.
        return re.sub(r"^\[[\d:]+\] \S+: ", "", str(error)).strip() or TOO_COSTLY
    except MemoryError:
        return TOO_COSTLY
    return "good"


def main(requests: TextIO, answers: TextIO) -> None:
    import xgrammar
    from transformers import AutoTokenizer

    start = json.loads(requests.readline())
    tokenizer = AutoTokenizer.from_pretrained(start["tokenizer"], **start["options"])
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=start["vocab_size"])
    judge = Judge(xgrammar, info, start["compact_json"])
    print("ready", file=answers, flush=True)
    for line in requests:
        print(json.dumps(tried(judge, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print, too
    main(sys.stdin, answers)
