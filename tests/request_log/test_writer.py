"""The queue and its thread: whole at the end, bounded, and never in the way of a request."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ochat_serve.request_log import RequestLog, writer
from tests.live import eventually
from tests.request_log.files import all_lines, aside, lines, record, request_log


class ScriptedSink:
    """Keeps lines while ``taking`` and ``lets`` it; waits for ``lets`` otherwise."""

    def __init__(self) -> None:
        self.taking = True
        self.lets = threading.Event()
        self.lets.set()
        self.lines: list[bytes] = []
        self.writes = 0
        self.closed = False
        self.trouble = "no room"

    def write(self, lines: Sequence[bytes]) -> int:
        self.writes += 1
        self.lets.wait()
        if self.taking:
            self.lines += lines
            return 0
        return len(lines)

    def work(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True


@contextmanager
def log_on(sink: ScriptedSink, **known: Any) -> Iterator[RequestLog]:
    log = RequestLog(sink, **{"clock": lambda: 0.0} | known)
    try:
        yield log
    finally:
        sink.lets.set()
        log.close()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records]


def test_close_writes_what_is_left(tmp_path: Path):
    path = tmp_path / "log"
    log = request_log(path, max_bytes=2**30)
    for number in range(5_000):
        log.write(record(request_id=str(number)))
    log.close()
    log.close()
    assert [line["request_id"] for line in lines(path)] == [str(number) for number in range(5_000)]
    assert log.dropped == 0


def test_after_the_end_lines_are_counted():
    sink = ScriptedSink()
    with log_on(sink) as log:
        log.close()
        log.write(record())
        assert (log.dropped, sink.lines, sink.closed) == (1, [], True)


def test_every_line_of_a_burst_once_across_all_files(tmp_path: Path):
    """Several threads, files that hold a few dozen lines, and some of them compressed already."""
    path = tmp_path / "log"
    log = request_log(path, max_bytes=20_000, max_count=10_000)

    def write_some(name: str) -> None:
        for number in range(1_500):
            log.write(record(user=name * 60, request_id=str(number)))

    threads = [threading.Thread(target=write_some, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert eventually(lambda: len(aside(path)) > 30 and aside(path)[-1].suffix == ".gz", 30)
    log.close()
    assert log.dropped == 0
    found = [(line["user"][0], int(line["request_id"])) for line in all_lines(path)]
    assert {len(line["user"]) for line in all_lines(path)} == {60}
    for name in "abcd":
        assert [number for of, number in found if of == name] == list(range(1_500))
    assert len(found) == 6_000


def test_a_writer_that_stands_still_holds_up_nobody(caplog: pytest.LogCaptureFixture):
    """So much waits, the rest is counted; what waited is written in the end."""
    sink = ScriptedSink()
    sink.lets.clear()
    weight = record().weight
    with log_on(sink, backlog_chars=10 * weight + 100) as log:
        log.write(record(request_id="stuck"))
        assert eventually(lambda: sink.writes == 1)
        for number in range(20):
            log.write(record(request_id=str(number)))
        log.write_lines([b"{}\n", b"{}\n"])  # light enough for what room is left
        log.write_lines([b" " * weight] * 3)
        assert log.dropped == 11 + 3
        sink.lets.set()
        assert eventually(lambda: len(sink.lines) == 1 + 9 + 2)
        assert eventually(lambda: told(caplog))
        for _ in range(10):
            log.write(record())
        assert eventually(lambda: len(sink.lines) == 22), "there is room again"
    assert log.dropped == 14
    assert told(caplog) == [
        "Lines of the request log are lost: they come faster than they are written.",
        "The request log is written again; 14 lines are lost.",
    ]


def test_content_weighs():
    sink = ScriptedSink()
    sink.lets.clear()
    with log_on(sink, backlog_chars=100_000) as log:
        log.write(record(outputs=["x" * 90_000]))
        log.write(record(request="x" * 90_000))
        assert log.dropped == 1


def test_a_full_disk_is_told_of_when_it_begins_and_when_it_ends(caplog: pytest.LogCaptureFixture):
    sink = ScriptedSink()
    sink.taking = False
    time = 0.0
    with log_on(sink, clock=lambda: time) as log:
        for count in range(1, 4):
            time += 2 * writer.TOLD_EVERY_S
            log.write(record())
            assert eventually(lambda count=count: log.dropped == count)
        sink.taking = True
        log.write(record())
        assert eventually(lambda: len(told(caplog)) == 2)
        log.write(record())
    assert told(caplog) == [
        "Lines of the request log are lost: no room.",
        "The request log is written again; 3 lines are lost.",
    ]
    assert [entry.levelno for entry in caplog.records] == [logging.ERROR, logging.WARNING]


def test_a_disk_that_is_full_in_turns_is_told_of_once_in_a_while(
    caplog: pytest.LogCaptureFixture,
):
    sink = ScriptedSink()
    time = 0.0
    with log_on(sink, clock=lambda: time) as log:
        for turn in range(10):
            for sink.taking in (False, True):
                before = sink.writes
                log.write(record())
                assert eventually(lambda before=before: sink.writes > before)
            if turn == 8:
                time += writer.TOLD_EVERY_S
    assert log.dropped == 10
    assert [text for text in told(caplog) if "no room" in text] == 2 * [
        "Lines of the request log are lost: no room."
    ]


def test_a_bug_in_one_line_is_one_line(caplog: pytest.LogCaptureFixture):
    sink = ScriptedSink()
    with log_on(sink) as log:
        log.write(record(time=object()))
        log.write(record())
    assert sink.lines == [record().line().encode() + b"\n"]
    assert log.dropped == 1
    assert "The record of request req-1 cannot be written" in told(caplog)


def test_the_end_does_not_wait_for_ever(caplog: pytest.LogCaptureFixture):
    sink = ScriptedSink()
    sink.lets.clear()
    with log_on(sink, close_timeout_s=0.05) as log:
        log.write(record())
        log.close()
        assert told(caplog) == ["The request log is left unfinished: its file takes no lines."]


def test_losses_of_all_processes_are_one_number():
    counts = [5, 0, 7]
    sink = ScriptedSink()
    sink.taking = False
    with log_on(sink, drops=counts, place=1) as log:
        log.write(record())
        assert eventually(lambda: log.dropped == 13)
    assert counts == [5, 1, 7]


def test_texts_are_edited_by_one_editor_a_line():
    sink = ScriptedSink()
    editors = iter(["first", "second"])

    def redaction():
        name = next(editors)
        return lambda text: name

    with log_on(sink, redaction=redaction) as log:
        log.write(record(user="a", metadata={"k": "v"}))
        log.write(record(user="b"))
    assert [b"first" in line for line in sink.lines] == [True, False]
    assert [b"second" in line for line in sink.lines] == [False, True]
