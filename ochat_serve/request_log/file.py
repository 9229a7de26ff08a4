"""The file of whole lines that a log is.

It is set aside when it is large or old.  A lock beside it, which stays when the file goes, keeps
other servers away.
"""

import fcntl
import os
import re
import stat
from collections.abc import Callable, Sequence

from ochat_serve.request_log.aside import Aside, Retention, open_private

_TIME = re.compile(rb'\{"time":(\d+(?:\.\d+)?)')


class LogFile:
    """A ``Sink``.  A device or a pipe is written to and otherwise left as it is.

    Raises OSError at once for a file that cannot be written, ``BlockingIOError`` for one that
    another server writes.  ``now`` gives Unix seconds.
    """

    def __init__(self, path: str, retention: Retention, now: Callable[[], float]) -> None:
        self.trouble = ""
        self._retention = retention
        self._now = now
        self._file: int | None = None
        self._lock: int | None = None
        self._size = 0
        self._begun = 0.0
        self._tear = b""
        self._is_regular = not _is_special(path)
        self._path = os.path.realpath(path) if self._is_regular else path
        self._aside = Aside(self._path, retention)
        try:
            if self._is_regular:
                self._lock = _locked(self._path + ".lock")
            self._open()
        except OSError:
            self.close()
            raise

    def write(self, lines: Sequence[bytes]) -> int:
        """Returns how many lines were lost; ``trouble`` says why."""
        kept = 0
        try:
            self._prepare()
            while kept < len(lines):
                run = self._run_of(lines, kept)
                self._append(b"".join(run))
                kept += len(run)
        except OSError as error:
            self.trouble = f"{self._path}: {error.strerror or error}"
        return len(lines) - kept

    def work(self) -> bool:
        """Compress a piece of what was set aside."""
        return self._is_regular and self._aside.work()

    def close(self) -> None:
        """What is not compressed yet is left to the next start."""
        self._aside.close()
        self._shut()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _prepare(self) -> None:
        if self._file is not None and self._is_regular and not self._is_in_place():
            self._shut()
        if self._file is None:
            self._open()
        is_old = self._now() - self._begun > self._retention.max_age_s
        if self._is_regular and self._size and is_old:
            self._rotate()

    def _run_of(self, lines: Sequence[bytes], start: int) -> Sequence[bytes]:
        """As many lines as the file takes, in a new one if need be: at least one."""
        if not self._is_regular:
            return lines[start:]
        if self._size and self._size + len(lines[start]) > self._retention.max_bytes:
            self._rotate()
        end, size = start, self._size
        while end < len(lines) and size + len(lines[end]) <= self._retention.max_bytes:
            size += len(lines[end])
            end += 1
        return lines[start : max(end, start + 1)]

    def _append(self, data: bytes) -> None:
        """All of it, or an error and nothing: a line is never left half written."""
        left = memoryview(self._tear + data)
        assert self._file is not None
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError:
            if self._is_regular:
                self._mend()
            raise
        if not self._size:
            self._begun = self._now()
        self._size += len(self._tear) + len(data)
        self._aside.owe(len(data))
        self._tear = b""

    def _mend(self) -> None:
        assert self._file is not None
        try:
            os.ftruncate(self._file, self._size)
        except OSError:
            self._tear = b"\n"

    def _rotate(self) -> None:
        self._shut()
        self._aside.take()
        self._open()

    def _open(self) -> None:
        access = os.O_RDWR if self._is_regular else os.O_WRONLY
        self._file = open_private(self._path, access | os.O_APPEND | os.O_CREAT)
        self._size = os.fstat(self._file).st_size if self._is_regular else 0
        self._begun = self._now()
        self._tear = b""
        if self._size:
            # As old as its first line; a server before this one may have begun it.
            if begun := _TIME.match(os.pread(self._file, 64, 0)):
                self._begun = float(begun[1])
            if os.pread(self._file, 1, self._size - 1) != b"\n":
                self._tear = b"\n"  # a crash has cut the last line: none may be glued to it

    def _shut(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _is_in_place(self) -> bool:
        """Whether the open file still has its name: somebody may have moved or removed it."""
        assert self._file is not None
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            return False
        except OSError:
            return True  # nobody can tell; what is open can be written


def _is_special(path: str) -> bool:
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _locked(path: str) -> int:
    """The open file, locked for as long as it is open."""
    file = open_private(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file
