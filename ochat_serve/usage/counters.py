"""What is counted, for whom, and on which day."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from functools import lru_cache
from typing import Self

# Whose requests those are that need no key.  No key's name begins with an underscore.
ANONYMOUS = "_anonymous"
_DAY_S = 86_400


@dataclass(slots=True)
class Counters:
    """Sums over requests.  ``errors`` are those that failed, ``aborted`` those whose client
    left before the end; what these used until then is in the tokens."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    errors: int = 0
    aborted: int = 0

    def __iadd__(self, other: "Counters") -> Self:
        for name in COUNTERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def values(self) -> tuple[int, ...]:
        """In the order of ``COUNTERS``."""
        return astuple(self)


COUNTERS = tuple(field.name for field in fields(Counters))


@dataclass(frozen=True, slots=True)
class Row:
    """One key's account of one day.  ``day`` is ``YYYY-MM-DD``, UTC's."""

    key: str
    day: str
    counters: Counters


def total(rows: Iterable[Row]) -> Counters:
    summed = Counters()
    for row in rows:
        summed += row.counters
    return summed


def day_of(time_s: float) -> str:
    """The UTC day, ``YYYY-MM-DD``, of a Unix time in seconds."""
    return _day(int(time_s // _DAY_S))


@lru_cache(maxsize=4)  # nearly all requests are of today
def _day(number: int) -> str:
    """By the number of days since 1 January 1970."""
    # Years are counted from 1 March, so that the leap day is a year's last: then the months'
    # lengths repeat every five (153 days), and 400 years are 146,097 days.
    era, day = divmod(number + 719_468, 146_097)
    year = (day - day // 1_460 + day // 36_524 - day // 146_096) // 365
    day -= 365 * year + year // 4 - year // 100
    month = (5 * day + 2) // 153
    day -= (153 * month + 2) // 5
    civil = month + 3 if month < 10 else month - 9
    return f"{era * 400 + year + (civil <= 2):04}-{civil:02}-{day + 1:02}"
