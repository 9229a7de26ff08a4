"""The request log: one JSON line per request, whatever became of it.

A line is written by a thread of its own, so a slow disk never holds up a request.  Without
``content`` a line holds numbers and names only; nothing that a user or the model said.
"""

import json
import logging
import os
import queue
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from io import TextIOWrapper
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from typing import Any, Literal, Protocol

from ochat_serve.generation import Usage

Outcome = Literal["finished", "failed", "abandoned"]
logger = logging.getLogger(__name__)
_FILE_MODE = 0o600


@dataclass(slots=True)
class RequestRecord:
    """What is known of one request, filled in along its road.  Times are in seconds; ``time``
    is Unix time, ``total_s`` counts from the request's arrival, ``first_token_s`` from when its
    body was read."""

    time: float
    request_id: str
    method: str
    path: str
    client: str | None = None
    key: str | None = None
    id: str | None = None
    model: str | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    usage: Usage | None = None
    finish_reasons: list[str | None] = field(default_factory=list)
    queue_s: float | None = None
    first_token_s: float | None = None
    total_s: float | None = None
    status: int | None = None
    outcome: Outcome | None = None
    error: str | None = None
    # More for the response's head: what is left of the caller's limits.
    headers: dict[str, str] = field(default_factory=dict)
    request: dict[str, Any] | None = None
    outputs: list[str] | None = None

    def line(self) -> str:
        """One line of JSON; what is not known is left out."""
        fields = {
            "time": round(self.time, 3),
            "request_id": self.request_id,
            "id": self.id,
            "method": self.method,
            "path": self.path,
            "client": self.client,
            "key": self.key,
            "model": self.model,
            "user": self.user,
            "metadata": self.metadata,
            "parameters": self.parameters or None,
            "prompt_tokens": self.usage.prompt_tokens if self.usage else None,
            "completion_tokens": self.usage.completion_tokens if self.usage else None,
            "cached_tokens": self.usage.cached_tokens if self.usage else None,
            "finish_reasons": self.finish_reasons or None,
            "queue_s": _milliseconds(self.queue_s),
            "first_token_s": _milliseconds(self.first_token_s),
            "total_s": _milliseconds(self.total_s),
            "status": self.status,
            "outcome": self.outcome,
            "error": self.error,
            "request": self.request,
            "outputs": self.outputs,
        }
        known = {name: value for name, value in fields.items() if value is not None}
        return json.dumps(known, ensure_ascii=False, separators=(",", ":"))


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


class Log(Protocol):
    """Where records go.  With ``content`` they should hold what was said."""

    @property
    def content(self) -> bool: ...

    def write(self, record: RequestRecord) -> None:
        """Returns at once."""
        ...

    def close(self) -> None:
        """Leave no record behind."""
        ...


class _PrivateRotatingFile(RotatingFileHandler):
    """A rotating file that only its owner can read."""

    on_drop: Callable[[], None] = staticmethod(lambda: None)

    def _open(self) -> TextIOWrapper:
        return open(
            self.baseFilename,
            "a",
            encoding=self.encoding,
            errors=self.errors,
            opener=_open_private,
        )

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """A full or unwritable disk loses lines, never requests."""
        self.on_drop()


def _open_private(path: str, flags: int) -> int:
    """A file is private before its first line; a device or a pipe keeps its own permissions."""
    descriptor = os.open(path, flags, _FILE_MODE)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.fchmod(descriptor, _FILE_MODE)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class RequestLog:
    """Writes records to a rotating file.  Raises OSError at once if the file cannot be opened."""

    def __init__(self, path: str, *, max_mb: int, max_count: int, content: bool) -> None:
        self.content = content
        self.dropped = 0
        file = _PrivateRotatingFile(
            path, maxBytes=max_mb * 2**20, backupCount=max_count, encoding="utf-8"
        )
        file.on_drop = self._count_drop
        lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        self._handler = QueueHandler(lines)
        self._listener = QueueListener(lines, file)
        self._file = file
        self._listener.start()

    def write(self, record: RequestRecord) -> None:
        """Hand one line to the writer; returns at once."""
        self.write_line(record.line())

    def write_line(self, line: str) -> None:
        self._handler.emit(logging.makeLogRecord({"msg": line, "levelno": logging.INFO}))

    def close(self) -> None:
        """Write what is left, then close the file."""
        self._listener.stop()
        with suppress(OSError):  # what a full disk did not take is counted already
            self._file.close()

    def _count_drop(self) -> None:
        if not self.dropped:
            logger.error("The request log cannot be written; its lines are lost until it can.")
        self.dropped += 1
