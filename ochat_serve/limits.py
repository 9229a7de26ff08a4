"""What each key may use: requests and tokens per minute, at a time, per day and month.

Tokens are reserved before a request begins (its prompt and the longest answer it may get) and
settled at its end, so requests that run at the same time cannot use the same tokens twice.
"""

import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ochat_serve.caller import Caller, KeyLimits
from ochat_serve.errors import QuotaExceeded, RateLimited, RequestsLimited, TokensLimited

MINUTE_S = 60.0
HEADER_PARTS = ("limit", "remaining", "reset")
# A request that is refused for want of a place may try again when another has ended.
PARALLEL_RETRY_S = 1


@dataclass(frozen=True, slots=True)
class Period:
    """A day or a month of UTC: its name, and when it ends in Unix seconds."""

    name: str
    ends: float


Periods = Callable[[float], tuple[Period, Period]]  # Unix seconds -> the day, the month
# key, day or month -> tokens that were used in it; raises ``ApiError``
UsedBefore = Callable[[str, str], Awaitable[int]]


@dataclass(eq=False, slots=True)
class Reservation:
    """What one running request holds."""

    caller: Caller
    tokens: int
    periods: tuple[Period, Period]
    id: str = ""


class Limits(Protocol):
    """Where limits are kept: in this process, or shared by several."""

    async def request(self, caller: Caller) -> Mapping[str, str]:
        """Count one request of a key with limits.  Response headers that tell what is left.
        Raises ``RateLimited``."""
        ...

    async def reserve(self, caller: Caller, tokens: int) -> tuple[Reservation, Mapping[str, str]]:
        """Hold ``tokens`` and one of the parallel requests; ``settle`` must follow.  With response
        headers.  Raises ``RateLimited``."""
        ...

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        """The request has ended and used ``tokens``."""
        ...

    async def close(self) -> None: ...


@dataclass(slots=True)
class Bucket:
    """Holds ``limit`` at most and fills up within a minute.  ``level`` may be below 0: a debt."""

    level: float
    at: float

    def available(self, limit: int, now: float) -> float:
        passed_s = max(0, now - self.at)  # clocks are set back at times
        self.level = min(limit, self.level + passed_s * limit / MINUTE_S)
        self.at = now
        return self.level


@dataclass(slots=True)
class _Use:
    """What one key has used."""

    requests: Bucket
    tokens: Bucket
    parallel: int = 0
    # name of the day or month -> tokens used and reserved in it
    periods: dict[str, int] = field(default_factory=dict)
    # The very ones that were in force then: each reading of the key file makes others.
    limits: KeyLimits | None = None


async def no_use_before(key: str, period: str) -> int:
    """Where nothing is known of what came before."""
    return 0


class MemoryLimits:
    """``Limits`` of one process.  ``now`` gives Unix seconds; ``used_before`` the tokens that a key
    has used in a day or month before this process began."""

    def __init__(
        self,
        now: Callable[[], float],
        periods: Periods,
        used_before: UsedBefore = no_use_before,
    ) -> None:
        self._now = now
        self._periods = periods
        self._used_before = used_before
        self._use: dict[str, _Use] = {}

    async def request(self, caller: Caller) -> Mapping[str, str]:
        limit = caller.limits.requests_per_minute
        if limit is None:
            return {}
        now = self._now()
        bucket = self._of(caller, now).requests
        available = bucket.available(limit, now)
        if available < 1:
            raise requests_limited(caller, limit, (1 - available) * MINUTE_S / limit)
        bucket.level -= 1
        return headers("requests", limit, bucket.level)

    async def reserve(self, caller: Caller, tokens: int) -> tuple[Reservation, Mapping[str, str]]:
        use, limits = self._of(caller, self._now()), caller.limits
        now, periods = await self._learn(use, caller)
        if limits.parallel_requests is not None and use.parallel >= limits.parallel_requests:
            raise parallel_limited(caller, limits.parallel_requests)
        for period, quota in zip(periods, quotas(caller), strict=True):
            if quota is not None:
                left = quota - use.periods[period.name]
                if left <= 0:
                    raise quota_exceeded(caller, quota, period, now)
                # The last request before the end may go over it, but only one.
                tokens = min(tokens, left)
        told: Mapping[str, str] = {}
        if limits.tokens_per_minute is not None:
            tokens = min(tokens, limits.tokens_per_minute)
            told = self._take(caller, use, tokens, limits.tokens_per_minute, now)
        use.parallel += 1
        _count(use, periods, tokens)
        return Reservation(caller, tokens, periods), told

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        now = self._now()
        use = self._of(reservation.caller, now)
        use.parallel -= 1
        limit = reservation.caller.limits.tokens_per_minute
        if limit is not None:  # else nothing was taken from the bucket
            use.tokens.available(limit, now)
            use.tokens.level += reservation.tokens - tokens
        _count(use, reservation.periods, tokens - reservation.tokens)

    async def close(self) -> None:
        pass

    def _of(self, caller: Caller, now: float) -> _Use:
        assert caller.name is not None
        use = self._use.get(caller.name)
        if use is None:
            use = _Use(Bucket(math.inf, now), Bucket(math.inf, now))  # full, whatever the limit
            self._use[caller.name] = use
        return use

    def _take(
        self, caller: Caller, use: _Use, tokens: int, limit: int, now: float
    ) -> Mapping[str, str]:
        available = use.tokens.available(limit, now)
        if available < tokens:
            wait_s = (tokens - available) * MINUTE_S / limit
            raise tokens_limited(caller, limit, available, tokens, wait_s)
        use.tokens.level -= tokens
        return headers("tokens", limit, use.tokens.level)

    async def _learn(self, use: _Use, caller: Caller) -> tuple[float, tuple[Period, Period]]:
        """What was used before, once a period, and anew when the key's limits have been set anew:
        while there was no quota nothing was counted.  The time, and its day and month, whose
        counters are there: while the ledger was asked another day may have begun."""
        assert caller.name is not None
        counted = use.limits is caller.limits
        while True:
            now = self._now()
            periods = self._periods(now)
            wanted = [
                period.name
                for period, quota in zip(periods, quotas(caller), strict=True)
                if quota is not None
            ]
            unknown = [name for name in wanted if not (counted and name in use.periods)]
            if not unknown:
                break
            for name in unknown:
                used = await self._used_before(caller.name, name)
                # What runs is counted here only, what ran without a quota there only.
                use.periods[name] = max(used, use.periods.get(name, 0))
            counted = True
        use.limits = caller.limits
        if len(use.periods) > len(periods):  # yesterday's, and last month's
            names = (period.name for period in periods)
            use.periods = {name: use.periods[name] for name in names if name in use.periods}
        return now, periods


def _count(use: _Use, periods: tuple[Period, Period], tokens: int) -> None:
    """In those counters that are there: one that is begun here would lack what was before."""
    for period in periods:
        if period.name in use.periods:
            use.periods[period.name] += tokens


def quotas(caller: Caller) -> tuple[int | None, int | None]:
    return caller.limits.tokens_per_day, caller.limits.tokens_per_month


def requests_limited(caller: Caller, limit: int, wait_s: float) -> RateLimited:
    return RequestsLimited(
        f"Rate limit reached for the key {caller.name}: {limit} requests per minute. "
        f"Please try again in {_whole(wait_s)} s.",
        retry_after_s=_whole(wait_s),
        headers=headers("requests", limit, 0),
    )


def parallel_limited(caller: Caller, limit: int) -> RateLimited:
    return RequestsLimited(
        f"Rate limit reached for the key {caller.name}: {limit} parallel requests. "
        "Please try again when one of them has ended.",
        retry_after_s=PARALLEL_RETRY_S,
    )


def tokens_limited(
    caller: Caller, limit: int, available: float, tokens: int, wait_s: float
) -> RateLimited:
    return TokensLimited(
        f"Rate limit reached for the key {caller.name}: {limit} tokens per minute, "
        f"{max(0, int(available))} left, {tokens} requested (prompt and max_tokens). "
        f"Please try again in {_whole(wait_s)} s.",
        retry_after_s=_whole(wait_s),
        headers=headers("tokens", limit, available),
    )


def quota_exceeded(caller: Caller, quota: int, period: Period, now: float) -> RateLimited:
    return QuotaExceeded(
        f"The key {caller.name} has used its quota of {quota} tokens for {period.name} (UTC). "
        f"It is renewed in {_whole(period.ends - now)} s.",
        retry_after_s=_whole(period.ends - now),
    )


def _whole(seconds: float) -> int:
    """Seconds to wait, rounded up: sooner would be in vain."""
    return max(1, math.ceil(seconds))


def headers(what: str, limit: int, level: float) -> dict[str, str]:
    """As OpenAI names them; ``what`` is "requests" or "tokens"."""
    return {
        f"x-ratelimit-limit-{what}": str(limit),
        f"x-ratelimit-remaining-{what}": str(max(0, int(level))),
        f"x-ratelimit-reset-{what}": _duration((limit - level) * MINUTE_S / limit),
    }


def _duration(seconds: float) -> str:
    """``1m30s``, ``2s``, ``150ms``."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1_000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
