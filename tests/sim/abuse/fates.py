"""What can become of a request: how it is asked, when its client leaves, what the log must say."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.sim.abuse.clients import Answer, Connection, post
from tests.sim.abuse.guarded import CHAT, KEYS, MAX_BODY_MB, secret

LIMITED = ("few-requests", "one-at-a-time", "few-tokens", "small-quota")
FINISHED = {200: "finished"}
LEFT = {None: "abandoned"}
Fields = dict[str, Any]


async def _stays(connection: Connection, rng: random.Random) -> Answer:
    return await connection.answer()


async def _leaves_at_once(connection: Connection, rng: random.Random) -> Answer:
    connection.hang_up()
    return Answer(None)


async def _leaves_later(connection: Connection, rng: random.Random) -> Answer:
    """While it waits in the queue, or is in the engine."""
    await asyncio.sleep(rng.random() / 2)
    return await _leaves_at_once(connection, rng)


async def _leaves_in_mid_stream(connection: Connection, rng: random.Random) -> Answer:
    for _ in range(rng.randint(1, 20)):
        await connection.read_until(b'"content":"')
    return await _leaves_at_once(connection, rng)


def _nothing(rng: random.Random) -> Fields:
    return {}


@dataclass(frozen=True)
class Fate:
    """``weight``: how often it is met.  ``ends``: statuses that the client may see, None if it
    leaves before, and the outcome in the log of each."""

    weight: int
    ends: Mapping[int | None, str]
    fields: Callable[[random.Random], Fields] = _nothing
    client: Callable[[Connection, random.Random], Awaitable[Answer]] = _stays
    body: bytes | None = None
    headers: Callable[[random.Random], tuple[str, ...]] = lambda rng: ()
    keys: tuple[str, ...] = ("anna", "ben")


def _long(rng: random.Random) -> Fields:
    """Nobody sees its end."""
    return {"max_tokens": 1_000, "stream": rng.random() < 0.5, "n": rng.randint(1, 3)}


def _impatient(rng: random.Random) -> tuple[str, ...]:
    return (f"x-ochat-timeout-s: {rng.uniform(0.02, 0.6):.3f}",)


FATES: dict[str, Fate] = {
    "answered": Fate(20, FINISHED),
    "streamed": Fate(20, FINISHED, lambda rng: {"stream": True}),
    "several choices": Fate(
        8, FINISHED, lambda rng: {"n": rng.randint(2, 5), "stream": rng.random() < 0.5}
    ),
    "copies": Fate(2, FINISHED, lambda rng: {"n": 3, "temperature": 0}),
    "stopped": Fate(5, FINISHED, lambda rng: {"stop": ["calm"], "max_tokens": 900}),
    "left at once": Fate(8, LEFT, _long, _leaves_at_once),
    "left later": Fate(8, LEFT, _long, _leaves_later),
    "left in mid-stream": Fate(
        8, LEFT, lambda rng: {**_long(rng), "stream": True}, _leaves_in_mid_stream
    ),
    "late": Fate(8, {200: "timeout", 504: "timeout"}, _long, headers=_impatient),
    "too large": Fate(2, {413: "rejected"}, body=b"x" * int(MAX_BODY_MB * 2**20 + 1)),
    "no JSON": Fate(2, {400: "rejected"}, body=b'{"messages": ['),
    "out of range": Fate(2, {400: "rejected"}, lambda rng: {"temperature": 9}),
    "too long": Fate(
        2, {400: "rejected"}, lambda rng: {"messages": [_message("word " * 2_000)]}
    ),
    "unknown model": Fate(2, {404: "rejected"}, lambda rng: {"model": "x"}),
    "stranger": Fate(3, {401: "rejected", 429: "rejected"}, keys=("stranger",)),
    "limited": Fate(20, {200: "finished", 429: "rejected"}, keys=LIMITED),
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One request of a fate."""

    id: str
    fate: str
    key: str
    message: bytes
    seed: int

    async def meet(self, connection: Connection) -> Answer:
        await connection.send(self.message)
        return await FATES[self.fate].client(connection, random.Random(self.seed))

    @property
    def known_key(self) -> str | None:
        return self.key if self.key in KEYS else None


def drawn(count: int, seed: int) -> list[Request]:
    """So many requests, the same ones each time."""
    rng = random.Random(seed)
    weights = [fate.weight for fate in FATES.values()]
    names = rng.choices(list(FATES), weights, k=count)
    return [_request(f"fate-{number}", name, rng) for number, name in enumerate(names)]


def _request(request_id: str, name: str, rng: random.Random) -> Request:
    fate = FATES[name]
    key = rng.choice(fate.keys)
    fields = {
        "messages": [_message("word " * rng.randint(1, 100))],
        "max_tokens": rng.randint(1, 12),
        **fate.fields(rng),
    }
    body = fate.body or json.dumps(fields).encode()
    said = (f"Authorization: Bearer {secret(key)}", f"X-Request-Id: {request_id}")
    message = post(CHAT, body, *said, *fate.headers(rng))
    return Request(request_id, name, key, message, rng.randrange(2**32))


def _message(text: str) -> Fields:
    return {"role": "user", "content": text}
