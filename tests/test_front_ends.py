"""Lines of several processes on their way to one log."""

import os
from pathlib import Path

from ochat_serve.front_ends import Pipes, SentLines
from ochat_serve.request_log import RequestLog
from tests.live import eventually
from tests.request_log.files import lines, record, request_log


def front_ends(pipes: Pipes) -> list[RequestLog]:
    """As each process has one; the test stands for all of them."""
    return [RequestLog(SentLines(sender), clock=lambda: 0.0) for sender in pipes.senders]


def test_every_line_of_every_front_end_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = request_log(path, max_bytes=2**30)
    pipes = Pipes(log, 3)
    logs = front_ends(pipes)
    for number in range(300):
        for place, each in enumerate(logs):
            each.write(record(user=str(place) * 2_000, status=number))
    for each in logs:
        each.close()
    pipes.close()
    log.close()
    found = [(line["user"][0], line["status"]) for line in lines(path)]
    assert {len(line["user"]) for line in lines(path)} == {2_000}
    assert sorted(found) == sorted((str(p), n) for p in range(3) for n in range(300))
    assert [each.dropped for each in [log, *logs]] == [0] * 4


def test_one_that_dies_in_the_middle_of_a_line_holds_up_no_other(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = request_log(path)
    pipes = Pipes(log, 2)
    # The size of a message, and a part of it.
    os.write(pipes.senders[0].fileno(), (1_000).to_bytes(4, "big") + b'{"time":')
    other = RequestLog(SentLines(pipes.senders[1]), clock=lambda: 0.0)
    other.write(record(user="other"))
    assert eventually(lambda: path.read_text())
    other.close()
    pipes.close()
    log.close()
    assert [line["user"] for line in lines(path)] == ["other"]


def test_without_a_parent_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = request_log(path)
    pipes = Pipes(log, 1)
    (front_end,) = front_ends(pipes)
    front_end.write(record())
    assert eventually(lambda: path.read_text())
    pipes.senders[0].close()  # writing fails, as when the other end is gone
    front_end.write(record())
    assert eventually(lambda: front_end.dropped == 1)
    front_end.close()
    pipes.close()
    log.close()
    assert len(lines(path)) == 1
