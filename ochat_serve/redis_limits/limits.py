"""``limits.Limits`` in Redis: the same answers as those of ``MemoryLimits``, for all that ask."""

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from secrets import token_hex
from typing import Any

from ochat_serve.caller import Caller, KeyLimits
from ochat_serve.errors import RateLimited
from ochat_serve.limits import (
    MINUTE_S,
    Period,
    Periods,
    Reservation,
    UsedBefore,
    headers,
    no_use_before,
    parallel_limited,
    quota_exceeded,
    quotas,
    requests_limited,
    tokens_limited,
)
from ochat_serve.redis_limits.link import RETRY_S, Argument, Link, Lost, Refused, Unanswered
from ochat_serve.redis_limits.scripts import REQUEST, RESERVE, SETTLE

# A counter is kept beyond its period's end: other machines' clocks may be behind this one's.
_KEPT_S = 3_600


class RedisLimits:
    """One round trip per question, of which a day's or month's first takes two.  This process'
    first for a key whose limits were set anew asks for its use before.

    ``lease_s``: after so long a reservation that nobody settled, its process being dead, no
    longer counts as a running request.  ``clock`` gives Unix seconds; without it they are Redis'
    own, and this machine's for the names of days and months.  ``used_before`` as for
    ``MemoryLimits``.  Methods raise ``Lost`` while Redis is lost, but for ``settle``.
    """

    def __init__(
        self,
        url: str,
        periods: Periods,
        *,
        lease_s: float,
        clock: Callable[[], float] | None = None,
        used_before: UsedBefore = no_use_before,
    ) -> None:
        self._link = Link(url)
        self._periods = periods
        self._lease_s = lease_s
        self._clock = clock
        self._used_before = used_before
        self._learned: dict[str | None, KeyLimits] = {}  # as ``MemoryLimits`` keeps them
        self._unsettled: dict[str, tuple[Reservation, int]] = {}
        self._settling: asyncio.Task[None] | None = None

    async def request(self, caller: Caller) -> Mapping[str, str]:
        limit = caller.limits.requests_per_minute
        if limit is None:
            return {}
        keys, args = [_key(caller, "requests")], [self._now, limit]
        let_in, told = await self._link.run(REQUEST, keys, args)
        level = float(told)
        if not let_in:
            raise requests_limited(caller, limit, (1 - level) * MINUTE_S / limit)
        return headers("requests", limit, level)

    async def reserve(self, caller: Caller, tokens: int) -> tuple[Reservation, Mapping[str, str]]:
        now = self._clock() if self._clock is not None else time.time()
        periods = self._periods(now)
        if not _holds_anything(caller):
            return Reservation(caller, tokens, periods), {}
        reservation = Reservation(caller, tokens, periods, token_hex(8))
        try:
            reply = await self._reserve(reservation, now)
        except Refused:
            raise  # what it held of it expires
        except (Unanswered, asyncio.CancelledError):
            self._settle_later(reservation, 0)  # it may be held
            raise
        if reply[0] != "held":
            raise _refusal(reservation, reply, now)
        _, reservation.tokens, level = reply
        limit = caller.limits.tokens_per_minute
        return reservation, {} if limit is None else headers("tokens", limit, float(level))

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        """Where Redis is lost this is done when it is found again; of a lease that has expired
        by then, what was reserved stays used."""
        if not reservation.id:
            return
        try:
            await self._settle(reservation, tokens)
        except Refused:
            pass  # its lease expires
        except Lost:
            self._settle_later(reservation, tokens)
        except asyncio.CancelledError:
            self._settle_later(reservation, tokens)
            raise

    async def close(self) -> None:
        if self._settling is not None:
            self._settling.cancel()
        await self._settle_all()
        await self._link.close()

    @property
    def _now(self) -> float | str:
        return self._clock() if self._clock is not None else ""

    async def _reserve(self, reservation: Reservation, now: float) -> Sequence[Any]:
        caller = reservation.caller
        asks = self._learned.get(caller.name) is not caller.limits
        reply = await self._ask(reservation, now, asks=asks)
        if reply[0] == "unknown":
            reply = await self._ask(reservation, now, asks=True)
        if reply[0] != "parallel":  # which comes before the counters
            self._learned[caller.name] = caller.limits
        return reply

    async def _ask(self, reservation: Reservation, now: float, *, asks: bool) -> Sequence[Any]:
        terms = await self._terms(reservation, now, asks=asks)
        reply: Sequence[Any] = await self._link.run(RESERVE, _keys(reservation), terms)
        return reply

    async def _terms(
        self, reservation: Reservation, now: float, *, asks: bool
    ) -> Sequence[Argument]:
        caller, limits = reservation.caller, reservation.caller.limits
        terms: list[Argument] = [
            *(self._now, reservation.id, reservation.tokens, self._lease_s),
            *(_or_none(limits.parallel_requests), _or_none(limits.tokens_per_minute)),
        ]
        for period, quota in _counted(reservation):
            used: Argument = ""
            if asks:
                assert caller.name is not None
                used = await self._used_before(caller.name, period.name)
            terms += [quota, math.ceil(period.ends - now) + _KEPT_S, used]
        return terms

    async def _settle(self, reservation: Reservation, tokens: int) -> None:
        limit = _or_none(reservation.caller.limits.tokens_per_minute)
        args = [self._now, reservation.id, tokens, limit]
        await self._link.run(SETTLE, _keys(reservation), args)

    def _settle_later(self, reservation: Reservation, tokens: int) -> None:
        self._unsettled[reservation.id] = reservation, tokens
        if self._settling is None or self._settling.done():
            self._settling = asyncio.create_task(self._keep_settling())

    async def _keep_settling(self) -> None:
        # First the pause: what was given up may still be on its way to Redis.
        while self._unsettled:
            await asyncio.sleep(RETRY_S)
            await self._settle_all()

    async def _settle_all(self) -> None:
        with suppress(Lost):
            for reservation, tokens in list(self._unsettled.values()):
                with suppress(Refused):
                    await self._settle(reservation, tokens)
                self._unsettled.pop(reservation.id, None)


def _key(caller: Caller, part: str) -> str:
    return f"ochat:{{{caller.name}}}:{part}"


def _holds_anything(caller: Caller) -> bool:
    limits = caller.limits
    return any(
        limit is not None
        for limit in (limits.parallel_requests, limits.tokens_per_minute, *quotas(caller))
    )


def _counted(reservation: Reservation) -> list[tuple[Period, int]]:
    """The periods that have a quota, and their quotas."""
    both = zip(reservation.periods, quotas(reservation.caller), strict=True)
    return [(period, quota) for period, quota in both if quota is not None]


def _keys(reservation: Reservation) -> list[str]:
    parts = ["running", "held", "tokens", *(period.name for period, _ in _counted(reservation))]
    return [_key(reservation.caller, part) for part in parts]


def _or_none(limit: int | None) -> int | str:
    return "" if limit is None else limit


def _refusal(reservation: Reservation, reply: Sequence[Any], now: float) -> RateLimited:
    caller = reservation.caller
    match reply:
        case "parallel", limit:
            return parallel_limited(caller, limit)
        case "quota", place:
            period, quota = _counted(reservation)[place]
            return quota_exceeded(caller, quota, period, now)
        case "tokens", limit, tokens, level:
            available = float(level)
            wait_s = (tokens - available) * MINUTE_S / limit
            return tokens_limited(caller, limit, available, tokens, wait_s)
    raise AssertionError(reply)
