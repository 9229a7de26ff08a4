"""``generation.GrammarChecker``: what is known of grammars, and whose turn it is to have one tried.

A grammar that was seen before costs a look into a table.  A new one is tried in another process,
one at a time and one of each key's at a time: nobody waits for more than one hostile grammar of
each other key, and each of those ends within the trial's bounds.
"""

import asyncio
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

from ochat_serve.errors import InvalidRequest, Unavailable
from ochat_serve.generation import ANY_OBJECT, Constraint
from ochat_serve.grammar.trial import TrialLost
from ochat_serve.json_schema import SchemaError, checked

MAX_KNOWN = 4_096
MAX_KNOWN_CHARS = 16 * 2**20  # of schemas that were changed; all others are not kept
MAX_WAITING = 64
MAX_WAITING_OF_KEY = 16
RETRY_S = 5


class Tries(Protocol):
    """Blocks; one thread at a time."""

    def verdict(self, kind: str, text: str, patterns: Sequence[str] = ()) -> str:
        """What is wrong with a grammar, "" for nothing.  Raises ``TrialLost``."""
        ...

    def kill(self) -> None:
        """From any thread: have ``verdict`` end at once."""
        ...

    def close(self) -> None: ...


class Known(NamedTuple):
    """What was found out: why it is refused, or "", and the text instead, or ""."""

    refusal: str
    text: str = ""


class TriedGrammars:
    """Grammars that were tried out, good and bad."""

    def __init__(self, trial: Tries) -> None:
        self._trial = trial
        self._known: OrderedDict[bytes, Known] = OrderedDict()
        self._known_chars = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._turn = asyncio.Lock()
        self._turns: WeakValueDictionary[str | None, asyncio.Lock] = WeakValueDictionary()
        self._waiting: Counter[str | None] = Counter()

    async def checked(self, constraint: Constraint, caller: str | None) -> Constraint:
        if constraint.text == ANY_OBJECT and constraint.kind == "json":
            return constraint  # JSON mode needs no other process
        key = hashlib.sha256(f"{constraint.kind}\0{constraint.text}".encode()).digest()
        known = self._known.get(key)
        if known is None:
            known = await self._found_out(key, constraint, caller)
        else:
            self._known.move_to_end(key)
        if known.refusal:
            raise InvalidRequest(
                f"Invalid {constraint.subject}: {known.refusal[:300].rstrip('.')}.",
                param=constraint.param,
                code="invalid_value",
            )
        return replace(constraint, text=known.text) if known.text else constraint

    async def _found_out(self, key: bytes, constraint: Constraint, caller: str | None) -> Known:
        if self._waiting.total() >= MAX_WAITING or self._waiting[caller] >= MAX_WAITING_OF_KEY:
            raise Unavailable(
                "Too many new schemas and grammars wait to be checked. Please try again.",
                code="overloaded",
                retry_after_s=RETRY_S,
            )
        self._waiting[caller] += 1
        try:
            async with self._turns.setdefault(caller, asyncio.Lock()), self._turn:
                known = self._known.get(key)  # another may have asked for it meanwhile
                return known or self._remember(key, await self._tried(constraint))
        finally:
            self._waiting[caller] -= 1
            if not self._waiting[caller]:
                del self._waiting[caller]

    def _remember(self, key: bytes, known: Known) -> Known:
        self._known[key] = known
        self._known_chars += len(known.text)
        while len(self._known) > MAX_KNOWN or self._known_chars > MAX_KNOWN_CHARS:
            _, forgotten = self._known.popitem(last=False)
            self._known_chars -= len(forgotten.text)
        return known

    async def _tried(self, constraint: Constraint) -> Known:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._try, constraint)
        except TrialLost as error:
            raise Unavailable(
                "The schema could not be checked. Please try again.",
                code="grammar_unavailable",
                retry_after_s=RETRY_S,
            ) from error

    def _try(self, constraint: Constraint) -> Known:
        if constraint.kind != "json":
            return Known(self._trial.verdict(constraint.kind, constraint.text))
        try:
            text, patterns = checked(constraint.text)
        except SchemaError as error:
            return Known(str(error))
        refusal = self._trial.verdict("json", text, patterns)
        return Known(refusal, "" if refusal or text == constraint.text else text)

    async def close(self) -> None:
        self._trial.kill()
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)
        self._trial.close()
