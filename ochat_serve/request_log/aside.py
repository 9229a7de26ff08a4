"""The log files that were set aside: numbered, compressed, and the oldest removed.

``requests.log.000001.gz`` and up.  A file keeps its number, so what is copied elsewhere is copied
once, and a crash between two steps leaves nothing out of order.
"""

import gzip
import logging
import os
import re
import stat
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass

logger = logging.getLogger(__name__)

_MODE = 0o600
# Compressed at a time, some milliseconds' work: lines are written in between.
_PIECE = 256 * 1024
# Twice as fast as zlib's default, for files a seventh larger.
_COMPRESSION = 3


@dataclass(frozen=True, slots=True)
class Retention:
    """``max_bytes`` and ``max_age_s`` of the file, ``max_count`` and ``total_bytes`` of those
    set aside.  One that waits to be compressed does not count into the total."""

    max_bytes: int
    max_age_s: float
    max_count: int
    total_bytes: int


class Aside:
    """The files set aside from ``path``."""

    def __init__(self, path: str, retention: Retention) -> None:
        self._path = path
        self._folder, name = os.path.split(path)
        self._name = re.compile(re.escape(name) + r"\.(\d{6,})(\.gz|\.gz\.part|)")
        self._retention = retention
        self._is_due = True  # a server before this one may have left some
        self._packing: Generator[None] | None = None
        self._owed = 0

    def take(self) -> None:
        """Set the file aside."""
        last = max((number for number, _ in self._files("", ".gz")), default=0)
        os.rename(self._path, f"{self._path}.{last + 1:06}")
        self._is_due = True
        self._trim()

    def owe(self, size: int) -> None:
        """So many bytes were written.  ``work`` compresses as many, so that one file is done
        before the next one is full."""
        self._owed += size

    def work(self) -> bool:
        """A piece of the compressing; False when there is nothing to do."""
        pieces, self._owed = 1 + self._owed // _PIECE, 0
        try:
            if self._packing is None and not self._begin():
                return False
            assert self._packing is not None
            for _ in range(pieces):
                next(self._packing)
        except StopIteration:
            self._end()
        except OSError as error:
            logger.warning("Old files of %s cannot be compressed: %s.", self._path, error.strerror)
            self._is_due = False  # until the next one is set aside
            self._end()
        return True

    def close(self) -> None:
        """What is not compressed is left to the next server."""
        if self._packing is not None:
            with suppress(OSError):  # a full disk does not take the end of what is half written
                self._packing.close()

    def _begin(self) -> bool:
        """Begin with the oldest that is not compressed."""
        if not self._is_due:
            return False
        for _, left in self._files(".gz.part"):
            _remove(left)
        waiting = self._files("")
        if waiting:
            self._packing = _packing(waiting[0][1])
        else:
            self._is_due = False
            self._trim()
        return bool(waiting)

    def _end(self) -> None:
        self._packing = None
        self._trim()

    def _trim(self) -> None:
        """Remove the oldest; what cannot be removed now can be later."""
        total = 0
        with suppress(OSError):
            for place, (_, path) in enumerate(reversed(self._files("", ".gz"))):
                waits = self._is_due and not path.endswith(".gz")
                total += 0 if waits else os.path.getsize(path)
                if place >= self._retention.max_count or total > self._retention.total_bytes:
                    _remove(path)

    def _files(self, *endings: str) -> list[tuple[int, str]]:
        """Their numbers and paths, the oldest first."""
        matches = map(self._name.fullmatch, os.listdir(self._folder))
        return sorted(
            (int(match[1]), os.path.join(self._folder, match[0]))
            for match in matches
            if match and match[2] in endings
        )


def _packing(source: str) -> Generator[None]:
    """Compresses a piece at each ``next``; what is there under the final name is whole."""
    target, part = f"{source}.gz", f"{source}.gz.part"
    try:
        yield from _compress(source, part)
        os.rename(part, target)
    except (OSError, GeneratorExit):
        _remove(part)
        raise
    with suppress(FileNotFoundError):
        os.unlink(source)


def _compress(source: str, target: str) -> Generator[None]:
    with (
        open(source, "rb") as plain,
        os.fdopen(open_private(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as raw,
    ):
        with gzip.GzipFile("", "wb", _COMPRESSION, raw) as packed:
            while piece := plain.read(_PIECE):
                packed.write(piece)
                yield
        raw.flush()
        os.fsync(raw.fileno())
        written = os.fstat(plain.fileno())
        os.utime(raw.fileno(), ns=(written.st_atime_ns, written.st_mtime_ns))


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def open_private(path: str, flags: int) -> int:
    """A file is private before its first byte; a device or a pipe keeps its own permissions."""
    file = os.open(path, flags | os.O_CLOEXEC, _MODE)
    try:
        if stat.S_ISREG(os.fstat(file).st_mode):
            os.fchmod(file, _MODE)
    except OSError:
        os.close(file)
        raise
    return file
