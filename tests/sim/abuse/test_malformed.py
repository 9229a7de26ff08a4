"""Ten thousand requests that are none, or hardly: each is told so, or served, and none hurts."""

import asyncio
import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator

from tests.sim.abuse.clients import Answer, Connection, by_many, post
from tests.sim.abuse.guarded import CHAT, Guarded, secret
from tests.sim.abuse.malformed_http import http_inputs
from tests.sim.abuse.malformed_json import json_inputs

HTTP_INPUTS = 4_000
JSON_INPUTS = 6_000
PATIENCE_S = 60
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
INTERNALS = re.compile(rb'Traceback|File "|pydantic|object at 0x|\.py\b')


@contextlib.contextmanager
def unharmed(guarded: Guarded) -> Iterator[None]:
    """Afterwards the server is as it was, has said nothing, and serves."""
    before = guarded.server.output
    yield
    assert guarded.is_at_rest()
    assert guarded.has_all_places()
    said = guarded.server.output.removeprefix(before)
    assert not re.search("Traceback|Exception|ERROR|WARN", said), said


def test_bytes_that_are_hardly_http(guarded: Guarded) -> None:
    async def ask(connection: Connection, data: bytes) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionError):
                await connection.send(data)
            received = await connection.everything()
        connection.hang_up()
        return received

    with unharmed(guarded):
        inputs = http_inputs(HTTP_INPUTS, seed=1)
        answers = asyncio.run(by_many(inputs, ask, port=guarded.port, clients=256))
        seen: Counter[int] = Counter()
        for data, received in zip(inputs, answers, strict=True):
            statuses = [int(status) for status in STATUS.findall(received)]
            assert statuses, (data, received)
            assert max(statuses) < 500, (data, received)
            assert not INTERNALS.search(received), (data, received)
            seen.update(statuses)
        # They came to every part of the server that can refuse them.
        assert {200, 400, 401, 403, 404, 405, 408, 415, 431} <= set(seen), seen


def test_bodies_that_are_hardly_json(guarded: Guarded) -> None:
    async def ask(connection: Connection, body: bytes) -> Answer:
        async with asyncio.timeout(PATIENCE_S):
            await connection.send(post(CHAT, body, f"Authorization: Bearer {secret('anna')}"))
            return await connection.answer()

    with unharmed(guarded):
        inputs = list(json_inputs(JSON_INPUTS, seed=2))
        answers = asyncio.run(by_many(inputs, ask, port=guarded.port, clients=64))
        for body, answer in zip(inputs, answers, strict=True):
            assert answer.status in (200, 400, 404), (body, answer)
            assert not INTERNALS.search(answer.body), (body, answer)
            if answer.status != 200:
                error = json.loads(answer.body)["error"]
                assert set(error) == {"message", "type", "param", "code"}, (body, answer)
