"""Counters and days."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ochat_serve.usage.counters import COUNTERS, Counters, Row, day_of, total

LAST_SECOND = 253_402_300_799  # of the year 9999


@given(st.floats(0, LAST_SECOND))
@example(0)
@example(951_782_399.999)  # 28 February of 2000, the last millisecond
@example(951_782_400)  # 29 February of 2000
@example(4_107_542_400)  # 1 March of 2100, which has no 29 February
@example(LAST_SECOND)
def test_days_are_the_calendars(time_s: float):
    assert day_of(time_s) == datetime.fromtimestamp(time_s, UTC).date().isoformat()


def test_a_day_begins_at_midnight_in_london():
    assert [day_of(86_400 * 365 + s) for s in (-0.001, 0)] == ["1970-12-31", "1971-01-01"]


@pytest.mark.parametrize("name", COUNTERS)
def test_every_counter_is_added(name: str):
    one = replace(Counters(), **{name: 2})
    one += replace(Counters(), **{name: 3})
    assert one == replace(Counters(), **{name: 5})
    assert dict(zip(COUNTERS, one.values(), strict=True))[name] == 5


def test_a_total_leaves_its_rows_alone():
    rows = [Row("a", "2023-11-14", Counters(1, 2, 3)), Row("b", "2023-11-14", Counters(4, 5, 6))]
    assert total(rows) == Counters(5, 7, 9)
    assert total(rows) == Counters(5, 7, 9)
    assert total([]) == Counters()
