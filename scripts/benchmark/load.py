"""The load: streaming chat requests over plain sockets, read without parsing.

The client must cost little beside the server, or its own work would be measured as the
server's waiting; so a lane is one connection, and an answer is counted, not decoded.
"""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

WORDS = (  # noqa: SIM905 - as a list it would be a page
    "time year people way day man thing woman life child world school state family student group "
    "country hand part place case week company system program question work number night point "
    "home water room mother area money story fact month lot right study book eye job word "
    "business issue side kind head house service friend father power hour game line end member "
    "law car city community name president team minute idea kid body information back parent face"
).split()
# Sent to every server; those that have no keys do not look.
KEY = "sk-bench"
END = b"0\r\n\r\n"
TIMEOUT_S = 300.0


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def conversation(rng: random.Random, turns: int, words_each: int) -> list[dict[str, str]]:
    """``turns`` questions with the answers between them; the last message is a question."""
    roles = ("user", "assistant")
    return [
        {"role": roles[place % 2], "content": words(rng, words_each)}
        for place in range(2 * turns - 1)
    ]


def body(messages: Sequence[dict[str, str]], max_tokens: int, model: str) -> bytes:
    fields: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0.7,
        "ignore_eos": True,  # every server makes the same number of tokens
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(fields).encode()


@dataclass
class Seen:
    """What the client saw of one case.  Times in seconds."""

    requests: int = 0
    failed: int = 0
    tokens: int = 0
    events: int = 0
    wall_s: float = 0.0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    error: str | None = None


def quantile(values: Sequence[float], share: float) -> float:
    """0.0 for no values at all."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class _Lane(asyncio.Protocol):
    """One connection: sends a request, counts its answer, sends the next one."""

    def __init__(self, head: str, bodies: Sequence[bytes], seen: Seen) -> None:
        self._head = head
        self._bodies = iter(bodies)
        self._seen = seen
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport  # uvloop's is no subclass of asyncio.Transport
        self._next()

    def _next(self) -> None:
        content = next(self._bodies, None)
        if content is None:
            self._transport.close()
            return
        self._tail = b""
        self._answered = False
        self._last: float | None = None
        self._started = time.perf_counter()
        self._transport.write(f"{self._head}{len(content)}\r\n\r\n".encode() + content)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self._answered:
            self._answered = True
            if not data.startswith(b"HTTP/1.1 200"):
                self._give_up(data[:300].decode(errors="replace"))
                return
        events = data.count(b"data: ")
        self._seen.events += events
        # An event without text (the role; half a character) is no news to a reader.
        if events > data.count(b'"content":""'):
            self._count(now)
        self._tail = (self._tail + data)[-2048:]
        if self._tail.endswith(END) and b"data: [DONE]" in self._tail:
            self._seen.tokens += _completion_tokens(self._tail)
            self._seen.requests += 1
            self._next()

    def _count(self, now: float) -> None:
        if self._last is not None:
            self._seen.gaps.append(now - self._last)
        else:
            self._seen.first.append(now - self._started)
        self._last = now

    def _give_up(self, reason: str) -> None:
        self._seen.failed += 1
        self._seen.error = reason
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


def _completion_tokens(tail: bytes) -> int:
    at = tail.rfind(b'"completion_tokens":')
    digits = tail[at + len(b'"completion_tokens":') :].lstrip()
    return int(digits[: len(digits) - len(digits.lstrip(b"0123456789"))]) if at >= 0 else 0


async def drive(
    port: int,
    lanes: Sequence[Sequence[bytes]],
    timeout_s: float = TIMEOUT_S,
    beside: Sequence[Sequence[bytes]] = (),
) -> Seen:
    """Every lane at once, its requests one after another; ``beside`` is not counted.

    Raises RuntimeError for a request that fails, OSError for a server that is not there.
    """
    seen, others = Seen(), Seen()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nAccept: */*\r\nAuthorization: Bearer {KEY}\r\n"
        "User-Agent: bench\r\nContent-Length: "
    )
    loop = asyncio.get_running_loop()

    async def opened(lanes: Sequence[Sequence[bytes]], counted: Seen) -> list[_Lane]:
        made = []
        for bodies in lanes:
            lane = _Lane(head, bodies, counted)
            await loop.create_connection(lambda lane=lane: lane, "127.0.0.1", port)
            made.append(lane)
        return made

    not_measured = await opened(beside, others)
    started = time.perf_counter()
    measured = await opened(lanes, seen)
    async with asyncio.timeout(timeout_s):
        await asyncio.gather(*(lane.done for lane in measured))
        seen.wall_s = time.perf_counter() - started
        await asyncio.gather(*(lane.done for lane in not_measured))
    expected = sum(map(len, lanes))
    if seen.requests != expected or others.failed:
        raise RuntimeError(
            f"{expected - seen.requests} requests failed: {seen.error or others.error}"
        )
    return seen
