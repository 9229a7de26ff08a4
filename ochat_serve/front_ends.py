"""Several front-end processes over one engine: ``--api-server-count``.

The parent binds the port, launches the engine and writes the request log; each front end is the
whole server of ``server`` with an engine that it shares.
"""

import multiprocessing
import os
import socket
import threading
from dataclasses import dataclass, field
from typing import Any, Protocol

from ochat_serve import cli
from ochat_serve.errors import StartupError
from ochat_serve.loader import PHASES, Share, new_cache_secret, prepare_engine, say
from ochat_serve.request_log import RequestLog, RequestRecord
from ochat_serve.server import SHUTDOWN_TIMEOUT_S, bind_for_each, open_log, prepare, serve

# A front end closes its streams before it ends; the engine goes after the last one.
STOP_TIMEOUT_S = SHUTDOWN_TIMEOUT_S + 15


class Lines(Protocol):
    """A queue between processes."""

    def put(self, line: str | None) -> None: ...
    def get(self) -> str | None: ...


@dataclass(frozen=True)
class Work:
    """What a front end gets from its parent: pickled once, when it starts.

    ``sockets`` are listening sockets for each of the front ends.
    """

    command: cli.Command
    sockets: list[list[socket.socket]]
    lines: Lines | None
    log_content: bool
    parent: int
    cache_secret: bytes = field(repr=False)


def run(command: cli.Command) -> int:
    """Serve until a signal ends it.  Returns the exit code; raises ``StartupError``."""
    prepare(command)
    settings = command.settings
    count = settings.api_server_count
    sockets = bind_for_each(settings.host, settings.port, count)
    log = open_log(settings)
    lines = multiprocessing.get_context("spawn").Queue() if log is not None else None
    writer = threading.Thread(target=_write, args=(log, lines), name="request log")
    if log is not None:
        writer.start()
    port = sockets[0][0].getsockname()[1]
    say(
        f"{count} front ends will listen on http://{settings.host}:{port}; loading {settings.model}"
    )
    try:
        _, args = prepare_engine(command, lambda phase: say(f"{phase} ..."))
        from ochat_serve.engine.group import run_group

        say(f"{PHASES[-1]} ...")
        work = Work(
            command,
            sockets,
            lines,
            log_content=log is not None and log.content,
            parent=os.getpid(),
            cache_secret=new_cache_secret(),
        )
        run_group(args, count, front_end, work, stop_timeout_s=STOP_TIMEOUT_S)
    finally:
        if lines is not None:
            lines.put(None)
            writer.join()
        if log is not None:
            log.close()
    return 0


def front_end(work: Work, connection: dict[str, Any]) -> int:
    """One of the processes: serves until a signal, or its parent's or engine's death."""
    for place, sockets in enumerate(work.sockets):
        if place != connection["client_index"]:
            for other in sockets:
                other.close()
    log = SentLog(work.lines, content=work.log_content) if work.lines is not None else None
    share = Share(connection, work.parent, work.cache_secret)
    try:
        return serve(work.command, work.sockets[share.index], log, share)
    except StartupError as error:
        say(f"front end {share.index + 1}: {error}")
        return 1


class SentLog:
    """The request log of a front end: its lines are written by the parent, so that several
    processes never write, or rotate, one file."""

    def __init__(self, lines: Lines, *, content: bool) -> None:
        self.content = content
        self._lines = lines

    def write(self, record: RequestRecord) -> None:
        """Hand one line over; returns at once."""
        self._lines.put(record.line())

    def close(self) -> None:
        """Nothing is left behind: the process sends what it holds before it ends."""


def _write(log: RequestLog, lines: Lines) -> None:
    while (line := lines.get()) is not None:
        log.write_line(line)
