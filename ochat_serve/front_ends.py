"""Several front-end processes over one engine: ``--api-server-count``.

The parent binds the port and answers there until the front ends do, launches the engine and
writes the request log; each front end is the
whole server of ``server`` with an engine that it shares.  Each adds to the one usage database.
"""

import os
import socket
import threading
import time
from collections.abc import MutableSequence, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from ochat_serve import cli, usage_db
from ochat_serve.cli import say
from ochat_serve.ending import ParentSignals, Stopped, leave
from ochat_serve.errors import StartupError
from ochat_serve.http_server import GRACE_S, HURRY, HURRY_S, RELOAD
from ochat_serve.loader import PHASES, Share, new_cache_secret, prepare_engine
from ochat_serve.meanwhile import Meanwhile
from ochat_serve.named_keys import open_key_file
from ochat_serve.request_log import RequestLog
from ochat_serve.server import (
    bind_for_each,
    open_log,
    prepare,
    redaction,
    serve,
)

CLOSE_TIMEOUT_S = 10


@dataclass(frozen=True)
class Work:
    """What a front end gets from its parent: pickled once, when it starts.

    ``sockets`` are listening sockets for each of the front ends, ``lines`` a pipe to the log for
    each, or none; ``drops`` counts the lines that each of them lost, and at last the parent.
    ``listening`` takes a message from each that listens.
    """

    command: cli.Command
    sockets: list[list[socket.socket]]
    lines: list[Connection]
    drops: MutableSequence[int]
    listening: Connection
    parent: int
    cache_secret: bytes = field(repr=False)


def run(command: cli.Command) -> int:
    """Serve until a signal ends it.  Returns the exit code; raises ``StartupError``."""
    signals = ParentSignals(HURRY, RELOAD)
    signals.handle()
    with suppress(Stopped):
        _run(command, signals)
    return signals.exit_code


def _run(command: cli.Command, signals: ParentSignals) -> None:
    """Raises ``Stopped`` after a signal, and ``StartupError``."""
    prepare(command)
    settings = command.settings
    count = settings.api_server_count
    open_key_file(settings)
    sockets = bind_for_each(settings.host, settings.port, count)
    ledger = usage_db.open_ledger(settings)  # one sentence from here, if it cannot be used
    drops: MutableSequence[int] = get_context("spawn").RawArray("Q", count + 1)
    log = open_log(settings, drops)
    pipes = Pipes(log, count) if log is not None else None
    port = sockets[0][0].getsockname()[1]
    where = f"{settings.scheme}://{settings.host}:{port}"
    meanwhile = Meanwhile(settings, sockets, log, ledger)

    def phase(name: str) -> None:
        meanwhile.serving.phase = name
        say(f"{name} ...")

    try:
        meanwhile.start()
        say(f"{count} front ends will listen on {where}; loading {settings.model}")
        _, args = prepare_engine(command, phase)
        from ochat_serve.engine.group import run_group

        phase(PHASES[-1])
        lines = pipes.senders if pipes is not None else []
        work = Work(
            command, sockets, lines, drops, meanwhile.listening, os.getpid(), new_cache_secret()
        )
        run_group(
            args,
            count,
            front_end,
            work,
            signals,
            stop_timeout_s=settings.drain_s + GRACE_S + HURRY_S,
        )
    finally:
        signals.is_ending = True
        meanwhile.end()
        if pipes is not None:
            pipes.close()
        if log is not None:
            log.close()


def front_end(work: Work, connection: dict[str, Any]) -> NoReturn:
    """One of the processes: serves until a signal, or its parent's or engine's death."""
    share = Share(
        connection, work.parent, work.cache_secret, lambda: work.listening.send_bytes(b"listening")
    )
    for place, sockets in enumerate(work.sockets):
        if place != share.index:
            for other in sockets:
                other.close()
    for place, pipe in enumerate(work.lines):
        if place != share.index:
            pipe.close()
    log = _sent_log(work, share.index) if work.lines else None
    try:
        ledger = usage_db.open_ledger(work.command.settings)
        code = serve(work.command, work.sockets[share.index], log, ledger, share)
    except StartupError as error:
        say(f"front end {share.index + 1}: {error}")
        code = 1
    leave(code)


def _sent_log(work: Work, place: int) -> RequestLog:
    return RequestLog(
        SentLines(work.lines[place]),
        clock=time.monotonic,
        redaction=redaction(work.command.settings),
        drops=work.drops,
        place=place,
    )


class SentLines:
    """The sink of a front end's log: lines are written by the parent, so that several processes
    never write, or rotate, one file."""

    trouble = "the parent process takes none"

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def write(self, lines: Sequence[bytes]) -> int:
        try:
            self._pipe.send_bytes(b"".join(lines))
        except OSError:
            return len(lines)
        return 0

    def work(self) -> bool:
        return False

    def close(self) -> None:
        self._pipe.close()


class Pipes:
    """From each front end to the parent's log.  A pipe and a thread each: one that dies in the
    middle of a line holds up no other."""

    def __init__(self, log: RequestLog, count: int) -> None:
        pipes = [Pipe(duplex=False) for _ in range(count)]
        self.senders = [sender for _, sender in pipes]
        self._threads = [
            threading.Thread(target=_receive, args=(receiver, log), name="lines", daemon=True)
            for receiver, _ in pipes
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Take what is left.  The front ends have ended."""
        for sender in self.senders:
            sender.close()
        for thread in self._threads:
            thread.join(CLOSE_TIMEOUT_S)


def _receive(pipe: Connection, log: RequestLog) -> None:
    with pipe, suppress(EOFError, OSError):
        while True:
            log.write_lines(pipe.recv_bytes().splitlines(keepends=True))
