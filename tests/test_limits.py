"""What a key may use, counted exactly, by a clock that the test moves: in memory and in Redis."""

import asyncio
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from ochat_serve.caller import Caller, KeyLimits
from ochat_serve.clock import periods
from ochat_serve.errors import ApiError, QuotaExceeded, RequestsLimited, TokensLimited
from ochat_serve.limits import Limits, MemoryLimits, UsedBefore, headers, no_use_before
from ochat_serve.redis_limits import RedisLimits

LEASE_S = 600.0
NOON = datetime(2026, 2, 27, 12, tzinfo=UTC).timestamp()


class Clock:
    now = NOON

    def __call__(self) -> float:
        return self.now


def key(**limits: int) -> Caller:
    return Caller("alice", limits=KeyLimits(**limits))


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Place:
    """Where limits are kept.  Several that are opened are as many processes, but in memory."""

    def __init__(self, clock: Clock, url: str | None) -> None:
        self._clock = clock
        self._url = url
        self._opened: list[Limits] = []

    def open(self, used_before: UsedBefore = no_use_before) -> Limits:
        limits: Limits
        if self._url is None:
            limits = MemoryLimits(self._clock, periods, used_before)
        else:
            limits = RedisLimits(
                self._url, periods, lease_s=LEASE_S, clock=self._clock, used_before=used_before
            )
        self._opened.append(limits)
        return limits

    async def close(self) -> None:
        for limits in self._opened:
            await limits.close()


@pytest.fixture(params=["memory", "redis"])
async def place(request: pytest.FixtureRequest, clock: Clock) -> AsyncIterator[Place]:
    in_redis = request.param == "redis"
    place = Place(clock, request.getfixturevalue("redis_url") if in_redis else None)
    yield place
    await place.close()


@pytest.fixture
def limits(place: Place) -> Limits:
    return place.open()


async def accepted(limits: Limits, caller: Caller, times: int) -> int:
    """How many of so many requests are let in."""
    count = 0
    for _ in range(times):
        try:
            await limits.request(caller)
            count += 1
        except RequestsLimited:
            pass
    return count


async def test_requests_per_minute(limits: Limits, clock: Clock) -> None:
    caller = key(requests_per_minute=60)
    assert await accepted(limits, caller, 100) == 60
    clock.now += 10
    assert await accepted(limits, caller, 100) == 10
    assert await accepted(limits, Caller("bob", limits=caller.limits), 100) == 60


async def test_the_rate_is_the_limits(limits: Limits, clock: Clock) -> None:
    """Asked all the time, at random moments."""
    caller, rng = key(requests_per_minute=30), random.Random(1)
    await accepted(limits, caller, 100)
    count, began = 0, clock.now
    while clock.now < began + 3_600:
        clock.now += rng.random()
        count += await accepted(limits, caller, 1)
    assert count == pytest.approx(30 * 60, rel=0.02)


async def test_the_wait_is_exact(limits: Limits, clock: Clock) -> None:
    caller = key(requests_per_minute=7)
    await accepted(limits, caller, 7)
    with pytest.raises(RequestsLimited, match=r"7 requests per minute\. .*in 9 s") as e:
        await limits.request(caller)
    assert e.value.retry_after_s == 9
    clock.now += 8
    assert await accepted(limits, caller, 1) == 0
    clock.now += 1
    assert await accepted(limits, caller, 2) == 1


async def test_tokens_are_reserved_and_settled(limits: Limits, clock: Clock) -> None:
    caller = key(tokens_per_minute=1_000)
    first, told = await limits.reserve(caller, 600)
    assert told["x-ratelimit-remaining-tokens"] == "400"
    with pytest.raises(TokensLimited, match="1000 tokens per minute, 400 left, 600 requested") as e:
        await limits.reserve(caller, 600)
    assert e.value.retry_after_s == 12
    await limits.settle(first, 100)
    second, told = await limits.reserve(caller, 600)
    assert told["x-ratelimit-remaining-tokens"] == "300"
    await limits.settle(second, 600)
    clock.now += 60
    _, told = await limits.reserve(caller, 1)
    assert told["x-ratelimit-remaining-tokens"] == "999"


async def test_a_request_larger_than_the_limit_has_all_of_it(limits: Limits, clock: Clock) -> None:
    """Alone it goes; what it uses beyond the limit is waited for afterwards."""
    caller = key(tokens_per_minute=1_000)
    large, _ = await limits.reserve(caller, 5_000)
    await limits.settle(large, 3_000)
    with pytest.raises(TokensLimited) as e:
        await limits.reserve(caller, 1)
    assert e.value.retry_after_s == pytest.approx(121, abs=1)
    clock.now += e.value.retry_after_s
    await limits.reserve(caller, 1)


async def test_what_was_used_beyond_is_owed_from_a_full_bucket_too(
    limits: Limits, clock: Clock
) -> None:
    """What flows in while a request runs does not flow over first and pay for it afterwards."""
    caller = key(tokens_per_minute=1_000)
    large, _ = await limits.reserve(caller, 5_000)
    clock.now += 120
    await limits.settle(large, 3_000)  # 2,000 beyond, of the 1,000 that are there
    with pytest.raises(TokensLimited) as e:
        await limits.reserve(caller, 1)
    assert e.value.retry_after_s == pytest.approx(61, abs=1)


async def test_parallel_requests(limits: Limits) -> None:
    caller = key(parallel_requests=2)
    held = [(await limits.reserve(caller, 1))[0] for _ in range(2)]
    with pytest.raises(RequestsLimited, match="2 parallel requests"):
        await limits.reserve(caller, 1)
    await limits.settle(held[0], 1)
    await limits.reserve(caller, 1)


@pytest.mark.parametrize(
    ("limit", "wait_s", "name"),
    [("tokens_per_day", 12 * 3_600, "2026-02-27"), ("tokens_per_month", 36 * 3_600, "2026-02")],
)
async def test_quotas(limits: Limits, clock: Clock, limit: str, wait_s: int, name: str) -> None:
    caller = key(**{limit: 100})
    first, _ = await limits.reserve(caller, 60)
    second, _ = await limits.reserve(caller, 60)
    assert (first.tokens, second.tokens) == (60, 40)  # the rest
    with pytest.raises(QuotaExceeded, match=rf"quota of 100 tokens for {name} \(UTC\)") as e:
        await limits.reserve(caller, 1)
    assert e.value.retry_after_s == wait_s
    await limits.settle(first, 60)
    await limits.settle(second, 39)
    third, _ = await limits.reserve(caller, 50)
    await limits.settle(third, 50)  # the last one may go over
    with pytest.raises(QuotaExceeded):
        await limits.reserve(caller, 1)
    clock.now += wait_s
    await limits.reserve(caller, 100)


async def test_what_began_yesterday_counts_for_yesterday(limits: Limits, clock: Clock) -> None:
    caller = key(tokens_per_day=100)
    late, _ = await limits.reserve(caller, 100)
    clock.now += 12 * 3_600
    await limits.settle(late, 90)
    today, _ = await limits.reserve(caller, 100)
    assert today.tokens == 100


async def test_quotas_go_on_where_the_ledger_stood(place: Place) -> None:
    used = {"2026-02-27": 95, "2026-02": 95}

    async def used_before(name: str, period: str) -> int:
        return used[period]

    limits = place.open(used_before)
    caller = key(tokens_per_day=100, tokens_per_month=1_000)
    await limits.settle((await limits.reserve(caller, 50))[0], 5)
    with pytest.raises(QuotaExceeded):
        await limits.reserve(caller, 1)


async def test_a_quota_that_is_taken_off_and_set_again_counts_what_was_between(
    place: Place,
) -> None:
    ledger = {"2026-02-27": 0, "2026-02": 0}

    async def used_before(name: str, period: str) -> int:
        return ledger[period]

    limits = place.open(used_before)
    for quotas in ({"tokens_per_day": 100}, {"tokens_per_month": 100}):
        await limits.settle((await limits.reserve(key(**quotas), 50))[0], 50)
        if "tokens_per_day" in quotas:
            ledger = dict.fromkeys(ledger, 50)
    ledger = dict.fromkeys(ledger, 1_100)  # by requests without a limit
    for caller in (key(tokens_per_day=999), key(tokens_per_day=999, tokens_per_month=999)):
        for _ in range(2):
            with pytest.raises(QuotaExceeded):
                await limits.reserve(caller, 1)


async def test_what_was_learned_is_kept_though_the_request_is_refused(
    place: Place, clock: Clock
) -> None:
    used = 0

    async def used_before(name: str, period: str) -> int:
        return used

    limits = place.open(used_before)
    running, _ = await limits.reserve(key(tokens_per_day=100, tokens_per_minute=80), 80)
    used = 100
    caller = key(tokens_per_day=150, tokens_per_minute=80, parallel_requests=1)
    with pytest.raises(RequestsLimited):
        await limits.reserve(caller, 1)
    await limits.settle(running, 80)
    with pytest.raises(TokensLimited):
        await limits.reserve(caller, 80)
    used = 0
    clock.now += 60
    assert (await limits.reserve(caller, 80))[0].tokens == 50


async def test_what_runs_while_limits_are_set_anew_stays_counted(place: Place) -> None:
    limits = place.open()
    running, _ = await limits.reserve(key(tokens_per_day=100), 60)
    held, _ = await limits.reserve(key(tokens_per_day=100), 100)
    assert held.tokens == 40
    await limits.settle(held, 0)
    await limits.settle(running, 10)
    assert (await limits.reserve(key(tokens_per_day=100), 100))[0].tokens == 90


async def test_the_ledger_is_asked_once_for_each_setting_of_the_limits(place: Place) -> None:
    asked: list[str] = []

    async def used_before(name: str, period: str) -> int:
        asked.append(period)
        return 0

    limits = place.open(used_before)
    for caller in (key(tokens_per_day=100), key(tokens_per_day=200)):
        for _ in range(5):
            await limits.settle((await limits.reserve(caller, 1))[0], 1)
    assert asked == ["2026-02-27"] * 2


async def test_a_month_that_begins_while_the_ledger_is_asked(place: Place, clock: Clock) -> None:
    """And a request of the last one ends meanwhile: nobody's counter is dropped."""
    asked, answers = asyncio.Event(), asyncio.Event()

    async def used_before(name: str, period: str) -> int:
        if period == "2026-03":
            asked.set()
            await answers.wait()
        return 40

    limits = place.open(used_before)
    caller = key(tokens_per_day=100, tokens_per_month=1_000)
    clock.now -= 24 * 3_600
    for _ in range(3):  # the 26th to the 28th
        late, _ = await limits.reserve(caller, 10)
        clock.now += 24 * 3_600
    begun = [asyncio.create_task(limits.reserve(caller, 25)) for _ in range(2)]
    await asked.wait()
    await limits.settle(late, 5)
    answers.set()
    held = [tokens.tokens for tokens, _ in await asyncio.gather(*begun)]
    assert held == [25, 25]
    last, _ = await limits.reserve(caller, 25)
    assert last.tokens == 10, "of the 100, 40 were used before"
    assert (await limits.reserve(key(tokens_per_month=1_000), 2_000))[0].tokens == 900


async def test_midnight_comes_while_the_ledger_is_asked(clock: Clock) -> None:
    async def used_before(name: str, period: str) -> int:
        if period == "2026-02-27":
            clock.now += 24 * 3_600
        return {"2026-02-27": 100, "2026-02-28": 30}[period]

    limits = MemoryLimits(clock, periods, used_before)
    held, _ = await limits.reserve(key(tokens_per_day=100), 1_000)
    assert (held.tokens, held.periods[0].name) == (70, "2026-02-28")


async def test_only_todays_counters_are_kept(clock: Clock) -> None:
    limits, caller = MemoryLimits(clock, periods), key(tokens_per_day=100, tokens_per_month=9_000)
    for _ in range(40):
        running, _ = await limits.reserve(caller, 10)
        clock.now += 24 * 3_600
        await limits.settle(running, 5)
    assert len(limits._use["alice"].periods) == 2


async def test_nothing_is_taken_by_who_is_refused(limits: Limits) -> None:
    caller = key(tokens_per_minute=100, parallel_requests=5, tokens_per_day=1_000)
    await limits.reserve(caller, 90)
    for _ in range(10):
        with pytest.raises(TokensLimited):
            await limits.reserve(caller, 50)
    _, told = await limits.reserve(caller, 10)
    assert told["x-ratelimit-remaining-tokens"] == "0"


async def test_never_above_the_limit_whatever_runs_at_once(limits: Limits, clock: Clock) -> None:
    caller = key(tokens_per_minute=1_000, tokens_per_day=3_000)
    used: list[int] = []

    async def request(rng: random.Random) -> None:
        try:
            held, _ = await limits.reserve(caller, 200)
        except ApiError:
            return
        await asyncio.sleep(0)
        tokens = rng.randrange(1, 201)
        used.append(tokens)
        await limits.settle(held, tokens)

    for minute in range(10):
        await asyncio.gather(*(request(random.Random(n)) for n in range(50)))
        assert sum(used) <= min(1_000 * (minute + 1) + 200, 3_000)
        clock.now += 60
    assert sum(used) > 2_500


async def test_changed_limits_are_in_force_at_once(limits: Limits) -> None:
    assert await accepted(limits, key(requests_per_minute=5), 9) == 5
    assert await accepted(limits, key(requests_per_minute=60), 9) == 0
    assert await limits.request(key()) == {}


async def test_a_clock_that_is_set_back_takes_nothing(limits: Limits, clock: Clock) -> None:
    caller = key(requests_per_minute=60)
    assert await accepted(limits, caller, 10) == 10
    clock.now -= 3_600
    assert await accepted(limits, caller, 100) == 50
    clock.now += 10
    assert await accepted(limits, caller, 100) == 10


async def test_keys_have_limits_of_their_own(limits: Limits) -> None:
    alice = key(tokens_per_minute=100, parallel_requests=1, tokens_per_day=100)
    await limits.reserve(alice, 100)
    bobs, _ = await limits.reserve(Caller("bob", limits=alice.limits), 100)
    assert bobs.tokens == 100


@pytest.mark.parametrize(
    ("level", "remaining", "reset"),
    [
        (60, "60", "0ms"),
        (59.5, "59", "500ms"),
        (59, "59", "1s"),
        (0, "0", "1m0s"),
        (-30, "0", "1m30s"),
    ],
)
def test_headers(level: float, remaining: str, reset: str) -> None:
    assert headers("requests", 60, level) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": remaining,
        "x-ratelimit-reset-requests": reset,
    }


@pytest.mark.parametrize(
    ("moment", "day", "month"),
    [
        ((2026, 12, 31, 23, 59), ("2026-12-31", (2027, 1, 1)), ("2026-12", (2027, 1, 1))),
        ((2028, 2, 29, 0, 0), ("2028-02-29", (2028, 3, 1)), ("2028-02", (2028, 3, 1))),
    ],
)
def test_days_and_months(moment: tuple, day: tuple, month: tuple) -> None:
    found = periods(datetime(*moment, tzinfo=UTC).timestamp())
    assert [(period.name, period.ends) for period in found] == [
        (name, datetime(*ends, tzinfo=UTC).timestamp()) for name, ends in (day, month)
    ]
