"""Wrong keys are counted by address, and right ones are never locked out."""

import pytest

from ochat_serve.errors import RequestsLimited
from ochat_serve.failed_attempts import ALLOWED, REFILL_S, FailedAttempts


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def guess(attempts: FailedAttempts, address: str, times: int) -> int:
    """How many of so many wrong keys were looked at."""
    for number in range(times):
        try:
            attempts.check(address, b"%d" % number)
        except RequestsLimited:
            return number
        attempts.failed(address)
    return times


def test_guessing_is_slowed_down_to_the_refill() -> None:
    clock = Clock()
    attempts = FailedAttempts(clock)
    assert guess(attempts, "10.0.0.1", 100) == ALLOWED
    with pytest.raises(RequestsLimited) as refused:
        attempts.check("10.0.0.1", b"x")
    clock.now += refused.value.retry_after_s
    assert guess(attempts, "10.0.0.1", 100) == 1
    clock.now += 1_000 * REFILL_S
    assert guess(attempts, "10.0.0.1", 100) == ALLOWED


def test_others_are_not_concerned() -> None:
    attempts = FailedAttempts(Clock())
    guess(attempts, "10.0.0.1", 100)
    assert guess(attempts, "10.0.0.2", 3) == 3


def test_a_key_that_worked_works_on() -> None:
    """A stranger behind the same gateway locks nobody out."""
    attempts = FailedAttempts(Clock())
    attempts.succeeded("10.0.0.1", b"good")
    guess(attempts, "10.0.0.1", 100)
    attempts.check("10.0.0.1", b"good")
    with pytest.raises(RequestsLimited):
        attempts.check("10.0.0.1", b"other")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("not:an:address", "not:an:address", True),
        ("", "", True),
    ],
)
def test_an_ipv6_customer_is_one(one: str, other: str, same: bool) -> None:
    attempts = FailedAttempts(Clock())
    guess(attempts, one, 100)
    assert guess(attempts, other, 1) == (0 if same else 1)


def test_memory_is_bounded() -> None:
    attempts = FailedAttempts(Clock())
    for number in range(20_100):
        attempts.failed(f"a{number}")
        attempts.succeeded(f"a{number}", b"k")
    assert len(attempts._left) == len(attempts._known) == 10_000
    assert guess(attempts, "a20099", 100) == ALLOWED - 1
