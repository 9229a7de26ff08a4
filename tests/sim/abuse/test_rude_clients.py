"""Clients that ask for much and read nothing, and a key that asks for all there is."""

import asyncio
import contextlib
import json
import math

import psutil
import pytest

from tests.live import RawClient, eventually
from tests.sim.abuse.clients import Connection, post
from tests.sim.abuse.guarded import (
    CHAT,
    LONG_NAME,
    MAX_MODEL_LEN,
    PLACES,
    Guarded,
    secret,
)

SILENT = 50
MAX_GROWTH = 50 * 2**20
FLOOD = 300
# Of a flood of short answers some end in any step, and others begin.
OVERTAKEN_BY = 12
GUESTS = 3


def asked(key: str, user: str, text: str = "x", **fields: object) -> bytes:
    """``user`` is how the log's line is found."""
    body = {"messages": [{"role": "user", "content": text}], "user": user, **fields}
    return post(CHAT, json.dumps(body).encode(), f"Authorization: Bearer {secret(key)}")


def lines_of(guarded: Guarded, user: str) -> list[dict]:
    return [line for line in guarded.lines() if line.get("user") == user]


def test_clients_that_never_read_are_dropped_and_hold_no_memory(guarded: Guarded) -> None:
    process = psutil.Process(guarded.server.process.pid)
    before = largest = process.memory_info().rss
    message = asked("anna", "never reads", model=LONG_NAME, stream=True, max_tokens=MAX_MODEL_LEN)

    def all_dropped() -> bool:
        nonlocal largest
        largest = max(largest, process.memory_info().rss)
        return len(lines_of(guarded, "never reads")) == SILENT

    with contextlib.ExitStack() as held:
        for _ in range(SILENT):
            client = held.enter_context(RawClient(guarded.port, receive_buffer=4_096))
            client.send(message)
        assert eventually(lambda: guarded.in_engine()[0] == SILENT)
        assert eventually(all_dropped, within_s=60)
        assert guarded.is_at_rest()
    assert largest - before < MAX_GROWTH
    for line in lines_of(guarded, "never reads"):
        assert (line["outcome"], line["status"]) == ("abandoned", 200)
        # Long before the end of what was asked for.
        assert line["completion_tokens"] < 0.75 * MAX_MODEL_LEN
    assert guarded.has_all_places()


@pytest.mark.parametrize(
    ("words", "begun"),
    [(1, PLACES - PLACES // 16), (400, 1)],
    ids=["short prompts", "long prompts"],
)
def test_a_flood_by_one_key_is_not_in_front_of_another(
    guarded: Guarded, words: int, begun: int
) -> None:
    """Of the hundreds that wait, a handful begins before the other key's request has its first
    token: as many as begin in the few steps that it takes anyway."""
    many, few = f"flood of {words}", f"guest of {words}"

    async def flooded() -> None:
        clients = [Connection(guarded.port) for _ in range(FLOOD)]
        for client in clients:
            await client.send(asked("flood", many, "word " * words, max_tokens=100))
        assert await asyncio.to_thread(has_begun)
        guest = Connection(guarded.port)
        for _ in range(GUESTS):
            await guest.send(asked("guest", few, max_tokens=2))
            assert (await guest.answer()).status == 200
        for client in (*clients, guest):
            client.hang_up()

    def has_begun() -> bool:
        """The flood has all the places that it gets, or its prefill is under way."""
        return eventually(lambda: sum(guarded.in_engine()) >= begun)

    asyncio.run(flooded())
    assert guarded.is_at_rest()
    assert eventually(lambda: len(lines_of(guarded, many)) == FLOOD)
    flood = lines_of(guarded, many)
    for line in lines_of(guarded, few):
        came, first_token = line["time"], line["time"] + line["first_token_s"]
        begins = [each["time"] + each.get("first_token_s", math.inf) for each in flood]
        waiting = [moment for moment in begins if moment > came]
        assert len(waiting) > FLOOD / 2
        assert sum(moment <= first_token for moment in waiting) <= OVERTAKEN_BY
