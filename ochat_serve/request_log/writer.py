"""The queue between requests and the log's file, and the thread behind it."""

import logging
import threading
from collections.abc import Callable, MutableSequence, Sequence
from typing import Protocol

from ochat_serve.request_log.record import Edit, RequestRecord

logger = logging.getLogger(__name__)

# What waits for the writer, in characters: a disk may stand still for half a minute under 500
# requests a second without their content.
BACKLOG_CHARS = 32 * 2**20
# Lines of this long are written together: the writer wakes, and asks for the interpreter, once.
LINGER_S = 0.05
CLOSE_TIMEOUT_S = 10
# A disk that is full and not full in turns is told of once in this time.
TOLD_EVERY_S = 60
_TOO_FAST = "they come faster than they are written"

# A request's record, or lines that another process has made.
Item = RequestRecord | Sequence[bytes]


class Log(Protocol):
    """Where records go."""

    @property
    def dropped(self) -> int:
        """Lines lost so far, in all processes of the server."""
        ...

    def write(self, record: RequestRecord) -> None:
        """Returns at once.  The record must not change any more."""
        ...

    def close(self) -> None:
        """Leave no record behind."""
        ...


class Sink(Protocol):
    """Where lines go.  One thread calls; everything may block, nothing raises."""

    @property
    def trouble(self) -> str:
        """Why lines were lost the last time."""
        ...

    def write(self, lines: Sequence[bytes]) -> int:
        """Whole lines, each with its line end.  Returns how many were lost."""
        ...

    def work(self) -> bool:
        """Do a piece of what can wait; False when nothing is left."""
        ...

    def close(self) -> None: ...


class RequestLog:
    """Makes lines of records and gives them to ``sink``, in a thread of its own.

    ``redaction`` makes what edits the texts of one line.  ``drops`` counts lost lines, at
    ``place`` those of this process.  ``clock`` gives seconds from any fixed point.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        clock: Callable[[], float],
        redaction: Callable[[], Edit] | None = None,
        drops: MutableSequence[int] | None = None,
        place: int = 0,
        backlog_chars: int = BACKLOG_CHARS,
        close_timeout_s: float = CLOSE_TIMEOUT_S,
    ) -> None:
        self._sink = sink
        self._redaction = redaction
        self._losses = _Losses(clock, [0] if drops is None else drops, place)
        self._close_timeout_s = close_timeout_s
        self._room = backlog_chars
        self._waiting: list[Item] = []
        self._lock = threading.Lock()  # of the two above
        self._news = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="request log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        return self._losses.count

    def write(self, record: RequestRecord) -> None:
        if not self._hand_over(record, record.weight):
            self._losses.add(1, _TOO_FAST)

    def write_lines(self, lines: Sequence[bytes]) -> None:
        """Whole lines that another process has made."""
        if not self._hand_over(lines, sum(map(len, lines))):
            self._losses.add(len(lines), _TOO_FAST)

    def close(self) -> None:
        """Write what is left.  A disk that stands still is not waited for."""
        self._closed.set()
        self._news.set()
        self._thread.join(self._close_timeout_s)
        if self._thread.is_alive():
            logger.error("The request log is left unfinished: its file takes no lines.")

    def _hand_over(self, item: Item, chars: int) -> bool:
        with self._lock:
            if chars > self._room or self._closed.is_set():
                return False
            self._room -= chars
            self._waiting.append(item)
        if not self._news.is_set():
            self._news.set()
        return True

    def _run(self) -> None:
        more = True  # a server before this one may have left work
        closed = False
        while not closed:
            closed = self._closed.is_set()  # before the last look at what has come
            items = self._take(wait=not (more or closed))
            if items:
                self._write(items)
            more = not closed and self._sink.work()
        self._sink.close()

    def _take(self, *, wait: bool) -> list[Item]:
        """What has come."""
        if wait:
            self._news.wait()
            self._closed.wait(LINGER_S)
        self._news.clear()
        with self._lock:
            items, self._waiting = self._waiting, []
        return items

    def _write(self, items: Sequence[Item]) -> None:
        lines: list[bytes] = []
        chars = 0
        for item in items:
            if isinstance(item, RequestRecord):
                chars += item.weight
                lines += self._lines(item)
            else:
                chars += sum(map(len, item))
                lines += item
        lost = self._sink.write(lines)
        if lost:
            self._losses.add(lost, self._sink.trouble)
        self._losses.tell()
        with self._lock:
            self._room += chars

    def _lines(self, record: RequestRecord) -> list[bytes]:
        """The record's line."""
        redact = self._redaction() if self._redaction is not None else None
        try:
            line = record.line(redact)
        except Exception:  # a bug of ours must not end the thread
            logger.exception("The record of request %s cannot be written", record.request_id)
            self._losses.add(1, "a bug")
            return []
        # What UTF-8 lacks, lone surrogates, become escapes of JSON.
        return [line.encode("utf-8", "backslashreplace") + b"\n"]


class _Losses:
    """Counts lost lines, from any thread, and tells of them from one."""

    def __init__(
        self, clock: Callable[[], float], counts: MutableSequence[int], place: int
    ) -> None:
        self._clock = clock
        self._counts = counts
        self._place = place
        self._lock = threading.Lock()  # of this process: none waits for another that is dead
        self._new: str | None = None
        self._losing = False
        self._told_at = -float("inf")

    @property
    def count(self) -> int:
        return sum(self._counts)

    def add(self, count: int, reason: str) -> None:
        with self._lock:
            self._counts[self._place] += count
            self._new = reason

    def tell(self) -> None:
        """One line when losses begin, one when they are over."""
        with self._lock:
            reason, self._new = self._new, None
        if reason is None:
            if self._losing:
                self._losing = False
                logger.warning("The request log is written again; %d lines are lost.", self.count)
        elif not self._losing and self._clock() - self._told_at >= TOLD_EVERY_S:
            self._losing = True
            self._told_at = self._clock()
            logger.error("Lines of the request log are lost: %s.", reason)
