"""One Redis server: runs scripts in it, tells once that it is lost, and finds it again."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.retry import Retry

from ochat_serve.errors import StartupError, Unavailable
from ochat_serve.redis_limits.scripts import PROBE, PROBE_KEY, Script

logger = logging.getLogger(__name__)
FAILURES = (RedisError, OSError)  # of which TimeoutError is one
Argument = str | int | float
START_TIMEOUT_S = 3
RETRY_S = 0.5
RETRY_AFTER_S = 1
MAX_CONNECTIONS = 32
# An event loop that was busy for long finds its timers run out before it reads what has come
# meanwhile: so Redis has lost its time when it is over twice.
_FIRST_TIMEOUT_S, _SECOND_TIMEOUT_S = 0.5, 0.25
_PROTOCOL = 2  # no greeting that old servers do not know, and nothing that is pushed


class Lost(Unavailable):
    """503: Redis is lost; it was not asked."""

    def __init__(self) -> None:
        super().__init__(
            "The limits of this API key cannot be checked at the moment. Please try again.",
            code="limits_unavailable",
            retry_after_s=RETRY_AFTER_S,
        )


class Unanswered(Lost):
    """503: Redis was asked, and whether it did what it was asked is not known."""


class Refused(Unanswered):
    """503: Redis works, and cannot do this: something else stands where a limit is kept."""


def shown(url: str) -> str:
    """The address without its secrets."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def check(url: str) -> None:
    """Whether limits can be kept there.  Blocks; raises ``StartupError``."""
    try:
        with redis.Redis.from_url(
            url,
            protocol=_PROTOCOL,
            retry=Retry(NoBackoff(), 0),
            socket_connect_timeout=START_TIMEOUT_S,
            socket_timeout=START_TIMEOUT_S,
        ) as client:
            client.eval(PROBE.text, 1, PROBE_KEY)
    except FAILURES as error:
        raise StartupError(f"--redis-url {shown(url)} cannot be used: {_reason(error)}.") from error
    except (ValueError, TypeError) as error:
        # Not the error's own words: they hold parts of the address.
        raise StartupError(f"--redis-url {shown(url)} has options that are not known.") from error


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text or "it did not answer in time"


class Link:
    """For one event loop.  Whoever asks waits for three quarters of a second at most."""

    def __init__(self, url: str) -> None:
        self._client = redis.asyncio.Redis.from_url(
            url,
            protocol=_PROTOCOL,
            retry=AsyncRetry(NoBackoff(), 0),
            socket_connect_timeout=None,  # one timeout for all, below
            socket_timeout=None,
            decode_responses=True,
        )
        self._where = shown(url)
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)
        self._finding: asyncio.Task[None] | None = None
        self._refused: set[str] = set()  # of which scripts' first keys

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """What the script returns.  Raises ``Unanswered`` when Redis gets lost, ``Lost`` at once
        while it is, and ``Refused`` for what only these keys stand in the way of."""
        async with self._places:
            if self._finding is not None:
                raise Lost
            try:
                answer = await self._ask(script, keys, args)
            except FAILURES as error:
                if isinstance(error, ResponseError) and await self._works():
                    self._complain(keys[0], error)
                    raise Refused from error
                self._lost(error)
                raise Unanswered from error
            self._refused.discard(keys[0])
            return answer

    async def close(self) -> None:
        if self._finding is not None:
            self._finding.cancel()
        await self._client.aclose()

    async def _ask(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        async with _patience():
            try:
                return await self._client.evalsha(script.sha, len(keys), *keys, *args)
            except NoScriptError:  # a Redis that has just started
                return await self._client.eval(script.text, len(keys), *keys, *args)

    async def _works(self) -> bool:
        try:
            await self._ask(PROBE, [PROBE_KEY], [])
        except FAILURES:
            return False
        return True

    def _complain(self, key: str, error: Exception) -> None:
        """Once, until it can be done again."""
        if key not in self._refused:
            self._refused.add(key)
            logger.error(
                "Limits of one key cannot be kept: %s: what stands at %s or beside it: %s. "
                "This key gets 503 until that is deleted.",
                self._where,
                key,
                _reason(error),
            )

    def _lost(self, error: Exception) -> None:
        if self._finding is None:
            logger.error(
                "Limits cannot be kept: %s: %s. Keys with limits get 503 until it works again.",
                self._where,
                _reason(error),
            )
            self._finding = asyncio.create_task(self._find())

    async def _find(self) -> None:
        while True:
            if await self._works():
                break
            await asyncio.sleep(RETRY_S)
        self._finding = None
        logger.warning("Limits are kept again: %s works.", self._where)


@asynccontextmanager
async def _patience() -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:
        timer = loop.call_later(
            _FIRST_TIMEOUT_S, lambda: limit.reschedule(loop.time() + _SECOND_TIMEOUT_S)
        )
        try:
            yield
        finally:
            timer.cancel()
