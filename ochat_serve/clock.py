"""Days and months, for quotas."""

from datetime import UTC, datetime, timedelta
from functools import lru_cache

from ochat_serve.limits import Period

DAY_S = 86_400


def periods(now: float) -> tuple[Period, Period]:
    """The day and the month of UTC in which ``now`` (Unix seconds) lies."""
    return _of_day(int(now // DAY_S))


@lru_cache(8)  # asked of every request with limits
def _of_day(day: int) -> tuple[Period, Period]:
    """``day`` counts from 1970."""
    midnight = datetime.fromtimestamp(day * DAY_S, UTC)
    first = midnight.replace(day=1)
    next_month = (first + timedelta(days=32)).replace(day=1)
    return (
        Period(f"{midnight:%Y-%m-%d}", (midnight + timedelta(days=1)).timestamp()),
        Period(f"{first:%Y-%m}", next_month.timestamp()),
    )
