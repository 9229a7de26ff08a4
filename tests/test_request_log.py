"""The request log: private, bounded, whole at the end, and never in the way of a request."""

import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ochat_serve.generation import Usage
from ochat_serve.request_log import RequestLog, RequestRecord
from tests.live import eventually

FULL_DISK = Path("/dev/full")


def record(**known: Any) -> RequestRecord:
    return RequestRecord(
        **{"time": 1.5, "request_id": "req-1", "method": "POST", "path": "/v1/x"} | known
    )


def open_log(path: Path, *, max_mb: int = 1, max_count: int = 3) -> RequestLog:
    return RequestLog(str(path), max_mb=max_mb, max_count=max_count, content=False)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_what_is_not_known_is_left_out():
    assert json.loads(record().line()) == {
        "time": 1.5,
        "request_id": "req-1",
        "method": "POST",
        "path": "/v1/x",
    }


def test_all_that_can_be_known():
    known = {
        "id": "chatcmpl-1",
        "client": "::1",
        "key": "key-1",
        "model": "m",
        "user": "u",
        "metadata": {"k": "v"},
        "parameters": {"n": 2},
        "finish_reasons": ["stop", None],
        "status": 200,
        "outcome": "finished",
        "error": "overloaded",
        "request": {"messages": []},
        "outputs": ["Hi"],
    }
    whole = record(
        **known, usage=Usage(9, 4, 8), time=1_700_000_000.12345, first_token_s=0.12345, total_s=0.0
    )
    assert json.loads(whole.line()) == known | {
        "time": 1_700_000_000.123,
        "request_id": "req-1",
        "method": "POST",
        "path": "/v1/x",
        "prompt_tokens": 9,
        "completion_tokens": 4,
        "cached_tokens": 8,
        "first_token_s": 0.123,
        "total_s": 0.0,
    }


@pytest.mark.parametrize("value", ["a\nb\r\n", "\0", '"\\', "\u2028\x85", "你好 👩‍🚀", "%s %d {}"])
def test_a_record_is_one_line(tmp_path: Path, value: str):
    path = tmp_path / "log"
    log = open_log(path)
    log.write(record(user=value, outputs=[value]))
    log.write(record())
    log.close()
    first, second = lines(path)
    assert (first["user"], first["outputs"]) == (value, [value])
    assert second == json.loads(record().line())


def test_no_content_unless_it_is_given(tmp_path: Path):
    path = tmp_path / "log"
    log = open_log(path)
    log.write(record(usage=Usage(9, 4), parameters={"stop": 2}))
    log.close()
    (line,) = lines(path)
    assert line.keys().isdisjoint({"request", "outputs", "messages"})


def test_close_writes_what_is_left(tmp_path: Path):
    path = tmp_path / "log"
    log = open_log(path, max_mb=8)
    for number in range(5_000):
        log.write(record(request_id=str(number)))
    log.close()
    assert [line["request_id"] for line in lines(path)] == [str(number) for number in range(5_000)]
    assert log.dropped == 0


def test_lines_of_many_threads_do_not_mix(tmp_path: Path):
    path = tmp_path / "log"
    log = open_log(path, max_mb=8)

    def write_some(name: str) -> None:
        for _ in range(200):
            log.write(record(user=name * 500))

    threads = [threading.Thread(target=write_some, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    users = [line["user"] for line in lines(path)]
    assert sorted(users) == [name * 500 for name in "abcd" for _ in range(200)]


def test_a_log_goes_on_where_the_last_one_ended(tmp_path: Path):
    path = tmp_path / "log"
    for name in ("first", "second"):
        log = open_log(path)
        log.write(record(user=name))
        log.close()
    assert [line["user"] for line in lines(path)] == ["first", "second"]


def rotated(path: Path, count: int) -> list[Path]:
    return [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, count + 1))]


def test_rotation_keeps_so_many_files(tmp_path: Path):
    """The newest lines, whole: rotation never cuts one in two."""
    path = tmp_path / "log"
    log = open_log(path, max_mb=1, max_count=3)
    for number in range(24):
        log.write(record(request_id=str(number), user="x" * 300_000))
    log.close()
    files = rotated(path, 3)
    assert sorted(tmp_path.iterdir()) == files
    assert all(file.stat().st_size <= 2**20 for file in files)
    kept = [line["request_id"] for file in reversed(files) for line in lines(file)]
    assert kept == [str(number) for number in range(24 - len(kept), 24)]
    assert len(kept) == 12
    assert log.dropped == 0


def touch(path: Path) -> None:
    path.write_text("{}\n")
    path.chmod(0o644)


@pytest.mark.parametrize("before", [touch, lambda path: None], ids=["existed", "new"])
@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_only_the_owner_reads_it(tmp_path: Path, before: Callable[[Path], None], mask: int):
    path = tmp_path / "log"
    before(path)
    with umask(mask):
        log = open_log(path, max_count=2)
        assert mode(path) == 0o600
        for _ in range(10):
            log.write(record(user="x" * 400_000))
        log.close()
    assert [mode(file) for file in rotated(path, 2)] == [0o600] * 3


def test_a_file_that_cannot_be_opened_is_said_at_once(tmp_path: Path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "none" / "log", tmp_path, tmp_path / "file" / "log"):
        with pytest.raises(OSError, match=str(path)):
            open_log(path)


def test_a_full_disk_loses_lines_and_nothing_else():
    """Each loss is counted; writing, closing and the device itself are as before."""
    before = mode(FULL_DISK)
    log = open_log(FULL_DISK)
    for _ in range(3):
        log.write(record())
    log.close()
    assert log.dropped == 3
    assert mode(FULL_DISK) == before


def test_a_disk_that_recovers(tmp_path: Path):
    """The folder goes, so rotation fails; when it is back, so is the log."""
    path = tmp_path / "logs" / "log"
    path.parent.mkdir()
    path.write_text("x" * 2**20)
    log = open_log(path)
    path.unlink()
    path.parent.rmdir()
    log.write(record(user="lost"))
    assert eventually(lambda: log.dropped)
    path.parent.mkdir()
    log.write(record(user="back"))
    log.close()
    assert [line["user"] for line in lines(path)] == ["back"]
    assert log.dropped == 1
