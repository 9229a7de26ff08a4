"""Clients that ask well or badly, read or do not, and leave when they like."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Answer:
    """``status`` is None where none came before the client left."""

    status: int | None
    body: bytes = b""


class Connection:
    """Opens itself when it is asked for something, and again after it was closed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, request: bytes) -> None:
        if self._writer is None or self._writer.is_closing():
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writer.write(request)
        await self._writer.drain()

    async def answer(self) -> Answer:
        """A whole one.  Raises ``IncompleteReadError`` where the server closes before it ends."""
        assert self._reader is not None
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = re.search(rb"\r\ncontent-length: (\d+)", head)
        if length is not None:
            body = await self._reader.readexactly(int(length[1]))
        else:
            body = b"".join([chunk async for chunk in self._chunks()])
        if b"\r\nconnection: close" in head:
            self.hang_up()
        return Answer(int(head.split()[1]), body)

    async def _chunks(self):
        assert self._reader is not None
        while size := int(await self._reader.readline(), 16):
            yield await self._reader.readexactly(size)
            await self._reader.readline()
        await self._reader.readline()

    async def read_until(self, mark: bytes) -> None:
        assert self._reader is not None
        await self._reader.readuntil(mark)

    async def everything(self) -> bytes:
        """All that comes until the server closes."""
        assert self._reader is not None
        try:
            return await self._reader.read()
        except ConnectionResetError:
            return b""

    def hang_up(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = None


async def by_many(
    items: Iterable[Item],
    act: Callable[[Connection, Item], Awaitable[Result]],
    *,
    port: int,
    clients: int,
) -> Sequence[Result]:
    """Every item, by so many clients at a time, each with one connection.  The results are in the
    order of the items."""
    numbered = list(enumerate(items))
    waiting = iter(numbered)
    results: dict[int, Result] = {}

    async def client() -> None:
        connection = Connection(port)
        try:
            for number, item in waiting:
                results[number] = await act(connection, item)
        finally:
            connection.hang_up()

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return [results[number] for number, _ in numbered]


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "Content-Type: application/json", *headers, "", ""]).encode() + body
