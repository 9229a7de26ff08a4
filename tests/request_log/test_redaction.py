"""Patterns are replaced, and none of them, on whatever text, holds up the server."""

import threading
import time

import pytest

from ochat_serve.request_log import Redaction
from ochat_serve.request_log.redaction import REDACTED

# Each takes longer than anybody lives.
FOR_EVER = [
    (r"(a|aa)+[^ab]", "a" * 5_000 + "bc"),
    (r"(x+x+)+y", "x" * 5_000 + "zy"),
    (r"(?:\w+\s?)+#\d", "word " * 10_000 + "#x"),
    (r"(\w|\d)*!", "a1" * 3_000 + " !"),
    (r"(?:a|b|ab|ba)*?c\d", "ab" * 50_000 + "cc"),
]


def redact(*patterns: str, clock=lambda: 0.0):
    return Redaction(patterns, clock)()


@pytest.mark.parametrize(
    ("patterns", "text", "edited"),
    [
        ((r"\d{4}",), "1234 and 5678", "[redacted] and [redacted]"),
        ((r"\d{4}",), "nothing", "nothing"),
        ((r"\w+@\w+\.\w+", r"(?i)secret"), "a@b.cd SECRET", "[redacted] [redacted]"),
        ((r"(?s)begin.*end",), "x begin\n1\n2 end y", "x [redacted] y"),
        ((r"好",), "你好", "你[redacted]"),
        # A pattern sees what those before it have left.
        ((r"a", r"\[redacted\]b"), "ab", "[redacted]"),
    ],
)
def test_matches_are_replaced(patterns: tuple[str, ...], text: str, edited: str):
    assert redact(*patterns)(text) == edited


@pytest.mark.parametrize(("pattern", "text"), FOR_EVER, ids=[pattern for pattern, _ in FOR_EVER])
def test_what_takes_too_long_is_replaced_whole(pattern: str, text: str):
    """Nobody has seen whether it holds a match."""
    assert redact(pattern)(text) == REDACTED


def test_other_threads_run_meanwhile():
    """The event loop is one: a pattern of ``re``'s would hold it up until the end."""
    steps = 0
    over = threading.Event()

    def count() -> None:
        nonlocal steps
        while not over.is_set():
            steps += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = steps
    try:
        assert redact(*FOR_EVER[0][:1])(FOR_EVER[0][1]) == REDACTED
        during = steps - before
    finally:
        over.set()
        thread.join()
    assert during > 10_000


def test_a_text_that_takes_too_long_leaves_time_for_others():
    pattern, text = FOR_EVER[1]
    line = Redaction([pattern, r"\d+"], time.thread_time)()
    assert [line("1"), line(text), line("messages 2")] == [
        "[redacted]",
        REDACTED,
        "messages [redacted]",
    ]


def test_all_texts_of_a_line_share_its_time(caplog: pytest.LogCaptureFixture):
    """However many messages a request has; the next line has time again."""
    now = 0.0
    redaction = Redaction([r"\d+"], lambda: now)
    line = redaction()
    assert line("in time 1") == "in time [redacted]"
    now = 1.0
    assert [line("late"), line("too late")] == [REDACTED] * 2
    assert redaction()("in time 2") == "in time [redacted]"
    assert [entry.getMessage() for entry in caplog.records] == [
        r"--log-redact \d+ takes too long on some texts: they are replaced whole."
    ]
