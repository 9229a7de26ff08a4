"""Requests as a ledger sees them, and what a request log sums up to."""

from collections.abc import Iterable
from typing import Any

from ochat_serve.generation import Usage
from ochat_serve.request_log import RequestRecord
from ochat_serve.usage.counters import Counters, Row, day_of

NOON = 1_700_000_000 // 86_400 * 86_400 + 43_200.0
DAY = "2023-11-14"
NEXT_DAY = "2023-11-15"
EVER = ("0000-01-01", "9999-12-31")


def request(key: str | None = "a", **known: Any) -> RequestRecord:
    """One that has finished: 3 tokens in, 2 of them cached, 5 out."""
    fixed = {"request_id": "req-1", "method": "POST", "path": "/v1/x"}
    usage = {"usage": Usage(3, 5, 2), "outcome": "finished", "time": NOON}
    return RequestRecord(**{**fixed, **usage, **known}, key=key)


def of(count: int, **more: int) -> Counters:
    """What ``count`` such requests add up to."""
    return Counters(count, 3 * count, 5 * count, 2 * count, **more)


def sums(lines: Iterable[dict[str, Any]]) -> list[Row]:
    """The accounts that the lines of a request log make."""
    accounts: dict[tuple[str, str], Counters] = {}
    for line in lines:
        if "key" in line:
            account = accounts.setdefault((day_of(line["time"]), line["key"]), Counters())
            account += Counters(
                1,
                line.get("prompt_tokens", 0),
                line.get("completion_tokens", 0),
                line.get("cached_tokens", 0),
                line["outcome"] not in ("finished", "abandoned"),
                line["outcome"] == "abandoned",
            )
    return [Row(key, day, counters) for (day, key), counters in sorted(accounts.items())]
