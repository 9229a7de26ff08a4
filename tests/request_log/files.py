"""What the tests of the log share: logs on files, and reading all of their lines back."""

import gzip
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ochat_serve.request_log import LogFile, RequestLog, RequestRecord, Retention


def record(**known: Any) -> RequestRecord:
    return RequestRecord(
        **{"time": 1.5, "request_id": "req-1", "method": "POST", "path": "/v1/x"} | known
    )


def retention(**known: Any) -> Retention:
    ample = {"max_bytes": 2**20, "max_age_s": 1e9, "max_count": 100, "total_bytes": 2**30}
    return Retention(**ample | known)


def log_file(path: Path, *, now: Callable[[], float] = lambda: 1.5, **known: Any) -> LogFile:
    return LogFile(str(path), retention(**known), now)


def request_log(path: Path, **known: Any) -> RequestLog:
    return RequestLog(log_file(path, **known), clock=lambda: 0.0)


def finish(file: LogFile) -> None:
    """Compress whatever waits for it."""
    while file.work():
        pass


def aside(path: Path) -> list[Path]:
    """The files set aside, the oldest first."""
    return sorted(p for p in path.parent.glob(f"{path.name}.0*"))


def text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


def lines(path: Path) -> list[dict[str, Any]]:
    """Of one file; every one must be whole."""
    *whole, end = text(path).split("\n")
    assert end == ""
    return [json.loads(line) for line in whole]


def all_lines(path: Path) -> list[dict[str, Any]]:
    """Of the file and of those set aside."""
    return [line for file in [*aside(path), path] for line in lines(file)]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
