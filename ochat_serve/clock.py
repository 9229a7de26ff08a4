"""Days and months, for quotas."""

from datetime import UTC, datetime, timedelta

from ochat_serve.limits import Period


def periods(now: float) -> tuple[Period, Period]:
    """The day and the month of UTC in which ``now`` (Unix seconds) lies."""
    midnight = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    first = midnight.replace(day=1)
    next_month = (first + timedelta(days=32)).replace(day=1)
    return (
        Period(f"{midnight:%Y-%m-%d}", (midnight + timedelta(days=1)).timestamp()),
        Period(f"{first:%Y-%m}", next_month.timestamp()),
    )
