"""Limits in Redis beyond what ``test_limits`` asks of every place: many at once, and loss."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest
import redis

from ochat_serve.caller import Caller, KeyLimits
from ochat_serve.clock import periods
from ochat_serve.errors import RateLimited, RequestsLimited, StartupError, Unavailable
from ochat_serve.limits import Limits
from ochat_serve.redis_limits import RedisLimits, check
from ochat_serve.redis_limits.link import shown
from tests.live import eventually
from tests.redis_server import RedisServer

NOON = 1_772_193_600.0  # 2026-02-27
LEASE_S = 600.0
PROCESSES = 2
REQUESTS = 200
ALL = KeyLimits(
    requests_per_minute=60,
    tokens_per_minute=1_000,
    parallel_requests=5,
    tokens_per_day=10_000,
    tokens_per_month=100_000,
)


def key(**limits: int) -> Caller:
    return Caller("alice", limits=KeyLimits(**limits))


@asynccontextmanager
async def limits_in(
    url: str, clock: Callable[[], float] | None = lambda: NOON, lease_s: float = LEASE_S
) -> AsyncIterator[RedisLimits]:
    limits = RedisLimits(url, periods, lease_s=lease_s, clock=clock)
    try:
        yield limits
    finally:
        await limits.close()


# Several processes at once.


async def requested(limits: Limits, caller: Caller, client: redis.Redis) -> int:
    try:
        await limits.request(caller)
    except RateLimited:
        return 0
    return 1


async def tokens_used(limits: Limits, caller: Caller, client: redis.Redis) -> int:
    try:
        held, _ = await limits.reserve(caller, 70)
    except RateLimited:
        return 0
    await limits.settle(held, held.tokens)
    return held.tokens


async def most_at_once(limits: Limits, caller: Caller, client: redis.Redis) -> int:
    while True:
        try:
            held, _ = await limits.reserve(caller, 70)
            break
        except RateLimited:
            await asyncio.sleep(0.01)
    client.rpush("running", client.incr("now"))
    await asyncio.sleep(0.001)
    client.decr("now")
    await limits.settle(held, 1)
    return 1


ACTS = {act.__name__: act for act in (requested, tokens_used, most_at_once)}


def hammer(url: str, act: str, caller: Caller) -> int:
    """In a process of its own: ``REQUESTS``, as many as can be at the same time."""

    async def run(client: redis.Redis) -> int:
        async with limits_in(url) as limits:
            acts = (ACTS[act](limits, caller, client) for _ in range(REQUESTS))
            return sum(await asyncio.gather(*acts))

    with redis.Redis.from_url(url) as client:
        client.incr("processes")
        assert eventually(lambda: int(client.get("processes") or 0) == PROCESSES, within_s=30)
        return asyncio.run(run(client))


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as processes:
        yield processes


def hammered(processes: ProcessPoolExecutor, *work: object) -> int:
    running = [processes.submit(hammer, *work) for _ in range(PROCESSES)]
    return sum(each.result(60) for each in running)


@pytest.mark.parametrize(
    ("act", "limit", "total"),
    [
        ("requested", {"requests_per_minute": 101}, 101),
        ("tokens_used", {"tokens_per_minute": 1_000}, 980),  # 14 times 70
        ("tokens_used", {"tokens_per_day": 1_000}, 1_000),
        ("tokens_used", {"tokens_per_month": 1_000, "tokens_per_day": 2_000}, 1_000),
    ],
)
def test_processes_together_get_the_limit_exactly(
    processes: ProcessPoolExecutor, redis_url: str, act: str, limit: dict[str, int], total: int
) -> None:
    assert hammered(processes, redis_url, act, key(**limit)) == total


def test_processes_together_never_run_more_than_may(
    processes: ProcessPoolExecutor, redis_url: str
) -> None:
    run = hammered(processes, redis_url, "most_at_once", key(parallel_requests=3))
    assert run == PROCESSES * REQUESTS
    with redis.Redis.from_url(redis_url) as client:
        running = [int(count) for count in client.lrange("running", 0, -1)]
    assert max(running) == 3


def die_while_running(url: str, caller: Caller) -> None:
    async def run() -> None:
        async with limits_in(url) as limits:
            await limits.reserve(caller, 10)
            redis.Redis.from_url(url).set("reserved", 1)
            await asyncio.sleep(60)

    asyncio.run(run())


async def test_what_a_dead_process_held_is_free_again_in_time(redis_url: str) -> None:
    caller = key(parallel_requests=1, tokens_per_day=100)
    process = get_context("spawn").Process(target=die_while_running, args=(redis_url, caller))
    process.start()
    with redis.Redis.from_url(redis_url) as client:
        assert eventually(lambda: client.get("reserved"), within_s=30)
    process.kill()
    process.join()
    now = NOON
    async with limits_in(redis_url, clock=lambda: now) as limits:
        now += LEASE_S - 1
        with pytest.raises(RequestsLimited):
            await limits.reserve(caller, 1)
        now += 2
        held, _ = await limits.reserve(caller, 1_000)
        assert held.tokens == 90  # what it used is not known: all that it held
    with redis.Redis.from_url(redis_url) as client:
        assert client.hlen("ochat:{alice}:held") == 1


async def test_a_lease_that_has_expired_is_not_settled(redis_url: str) -> None:
    now, caller = NOON, key(tokens_per_day=1_000)
    async with limits_in(redis_url, clock=lambda: now) as limits:
        held, _ = await limits.reserve(caller, 300)
        now += LEASE_S + 1
        assert await settled_tokens(limits, caller) == 300
        await limits.settle(held, 1)
        assert await settled_tokens(limits, caller) == 300


async def test_settling_begins_no_counter(redis_url: str) -> None:
    """It would never expire, and its period is over."""
    caller = key(tokens_per_day=1_000)
    with redis.Redis.from_url(redis_url) as client:
        async with limits_in(redis_url) as limits:
            held, _ = await limits.reserve(caller, 300)
            assert client.delete("ochat:{alice}:2026-02-27") == 1
            await limits.settle(held, 100)
        assert list(client.scan_iter()) == []


async def test_time_is_that_of_redis(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        async with limits_in(redis_url, clock=None, lease_s=0.2) as limits:
            seconds, _ = client.time()
            await limits.request(key(requests_per_minute=60))
            kept = client.hgetall("ochat:{alice}:requests")
            assert seconds <= float(kept[b"at"]) <= client.time()[0] + 1

            caller = key(parallel_requests=1)
            await limits.reserve(caller, 1)
            while True:
                try:
                    await limits.reserve(caller, 1)
                    break
                except RequestsLimited:
                    await asyncio.sleep(0.01)


# What stays in Redis, and what it costs.


async def test_all_that_is_kept_expires(redis_url: str) -> None:
    async with limits_in(redis_url) as limits:
        caller = Caller("alice", limits=ALL)
        await limits.request(caller)
        await limits.reserve(caller, 100)
        await limits.settle((await limits.reserve(caller, 900))[0], 7_000)
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        lives = {name: client.ttl(name) for name in client.scan_iter()}
    assert lives.keys() == {
        f"ochat:{{alice}}:{part}"
        for part in ("requests", "tokens", "running", "held", "2026-02-27", "2026-02")
    }
    hour, day = 3_600, 86_400
    expected = {
        "requests": 61,
        "tokens": 60 + 60 * 7.1,  # the debt and what is held: 7,100 at 1,000 a minute
        "running": LEASE_S + 60,
        "held": LEASE_S + 60,
        "2026-02-27": day // 2 + hour,
        "2026-02": day // 2 + day + hour,
    }
    for part, ttl in expected.items():
        assert lives[f"ochat:{{alice}}:{part}"] == pytest.approx(ttl, abs=10), part


async def test_one_round_trip_each(redis_url: str) -> None:
    def commands() -> dict[str, int]:
        stats = client.info("commandstats")
        return {
            name: stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("eval", "evalsha")
        }

    caller = Caller("alice", limits=ALL)
    with redis.Redis.from_url(redis_url) as client:
        async with limits_in(redis_url) as limits:
            await limits.settle((await limits.reserve(caller, 9))[0], 9)
            await limits.request(caller)
            client.config_resetstat()
            for _ in range(10):
                await limits.request(caller)
                await limits.settle((await limits.reserve(caller, 9))[0], 9)
            assert commands() == {"eval": 0, "evalsha": 30}
            client.config_resetstat()
            await limits.settle((await limits.reserve(key(requests_per_minute=60), 9))[0], 9)
            await limits.request(key(tokens_per_day=100))
            assert commands() == {"eval": 0, "evalsha": 0}, "nothing is limited there"


# Loss.


async def settled_tokens(limits: Limits, caller: Caller) -> int:
    """The tokens of the day that are used and held."""
    assert caller.limits.tokens_per_day is not None
    held, _ = await limits.reserve(caller, 10**9)
    await limits.settle(held, 0)
    return caller.limits.tokens_per_day - held.tokens


async def found_again(limits: Limits) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                await limits.request(Caller("prober", limits=KeyLimits(requests_per_minute=10**6)))
                return
            except Unavailable:
                await asyncio.sleep(0.01)


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.name.startswith("ochat_serve")
    ]


async def test_a_loss_and_its_end_are_told_once(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    caller = key(requests_per_minute=1_000)
    async with limits_in(redis_server.url) as limits:
        await limits.request(caller)
        redis_server.kill()
        for asked in await asyncio.gather(
            *(limits.request(caller) for _ in range(100)), return_exceptions=True
        ):
            assert isinstance(asked, Unavailable)
            assert (asked.code, asked.retry_after_s) == ("limits_unavailable", 1)
        await asyncio.sleep(1)
        with pytest.raises(Unavailable):
            await limits.request(caller)
        assert [level for level, _ in lines(caplog)] == ["ERROR"]
        redis_server.start()
        await found_again(limits)
        await limits.request(caller)
    (_, lost), (level, found) = lines(caplog)
    assert lost.startswith(f"Limits cannot be kept: {redis_server.url}: ")
    assert "503" in lost
    assert (level, found) == ("WARNING", f"Limits are kept again: {redis_server.url} works.")


async def test_a_key_whose_entry_is_broken_is_refused_alone(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    broken, other = Caller("alice", limits=ALL), Caller("bob", limits=ALL)
    with redis.Redis.from_url(redis_url) as client:
        async with limits_in(redis_url) as limits:
            runs, _ = await limits.reserve(broken, 10)
            client.delete("ochat:{alice}:held")
            client.set("ochat:{alice}:held", "x")
            for _ in range(3):
                with pytest.raises(Unavailable) as e:
                    await limits.reserve(broken, 10)
                assert e.value.code == "limits_unavailable"
                await limits.settle((await limits.reserve(other, 10))[0], 10)
            await limits.settle(runs, 10)
            assert limits._unsettled == {}, "others would wait behind it for ever"
            ((level, said),) = lines(caplog)
            assert level == "ERROR"
            assert "ochat:{alice}:" in said
            assert "WRONGTYPE" in said or "wrong kind of value" in said
            client.delete("ochat:{alice}:held", "ochat:{alice}:running")
            held, _ = await limits.reserve(broken, 10)
            await limits.settle(held, 10)


async def test_one_that_takes_no_more_is_lost_and_not_the_keys_fault(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caller = Caller("alice", limits=ALL)
    async with limits_in(redis_server.url) as limits:
        await limits.settle((await limits.reserve(caller, 10))[0], 10)
        redis_server.client.replicaof("127.0.0.1", "1")
        with pytest.raises(Unavailable):
            await limits.reserve(caller, 10)
        assert [said.split(":")[0] for _, said in lines(caplog)] == ["Limits cannot be kept"]
        redis_server.client.replicaof("NO", "ONE")
        await found_again(limits)


async def test_one_that_hangs_is_lost_too(redis_server: RedisServer) -> None:
    """Nothing of what was given up, or settled meanwhile, is lost or counted twice."""
    caller = key(parallel_requests=3, tokens_per_day=1_000, tokens_per_minute=1_000)
    async with limits_in(redis_server.url) as limits:
        runs, _ = await limits.reserve(caller, 300)
        redis_server.stop()
        with pytest.raises(Unavailable):
            await limits.reserve(caller, 5_000)
        await limits.settle(runs, 120)
        redis_server.go_on()
        await found_again(limits)
    async with limits_in(redis_server.url) as limits:  # closing settles what is left
        assert await settled_tokens(limits, caller) == 120
        for _ in range(3):
            await limits.reserve(caller, 100)
        with pytest.raises(RequestsLimited):
            await limits.reserve(caller, 1)


async def test_what_is_settled_while_it_is_lost_is_settled_afterwards(
    redis_server: RedisServer,
) -> None:
    caller = key(tokens_per_day=1_000)
    async with limits_in(redis_server.url) as limits:
        first, _ = await limits.reserve(caller, 300)
        second, _ = await limits.reserve(caller, 300)
        redis_server.stop()
        await limits.settle(first, 120)  # not answered
        await limits.settle(second, 1)  # not asked
        redis_server.go_on()
        await found_again(limits)
    async with limits_in(redis_server.url) as limits:  # closing settles what is left
        assert await settled_tokens(limits, caller) == 121


async def test_a_reservation_is_settled_once(redis_url: str) -> None:
    caller = key(tokens_per_day=1_000)
    async with limits_in(redis_url) as limits:
        held, _ = await limits.reserve(caller, 300)
        for _ in range(3):
            await limits.settle(held, 100)
        assert await settled_tokens(limits, caller) == 100


async def test_one_that_forgot_all_owes_nothing(redis_server: RedisServer) -> None:
    """Killed and started again without its data, while a request runs."""
    caller = key(parallel_requests=1, tokens_per_day=1_000, tokens_per_minute=1_000)
    async with limits_in(redis_server.url) as limits:
        runs, _ = await limits.reserve(caller, 900)
        redis_server.kill()
        with pytest.raises(Unavailable):
            await limits.reserve(caller, 1)
        redis_server.start()
        await found_again(limits)
        await limits.settle(runs, 10)
        held, told = await limits.reserve(caller, 10_000)
        assert held.tokens == 1_000
        assert told["x-ratelimit-remaining-tokens"] == "0"


async def test_a_request_that_is_given_up_while_it_reserves_holds_nothing(
    redis_url: str,
) -> None:
    caller = key(parallel_requests=1, tokens_per_day=1_000)
    async with limits_in(redis_url) as limits:
        await limits.settle((await limits.reserve(caller, 1))[0], 0)
        for turns in range(20):
            reserving = asyncio.create_task(limits.reserve(caller, 900))
            for _ in range(turns):
                await asyncio.sleep(0)
            reserving.cancel()
            done = (await asyncio.gather(reserving, return_exceptions=True))[0]
            if isinstance(done, tuple):
                await limits.settle(done[0], 0)
        async with asyncio.timeout(30):
            while True:
                try:
                    assert await settled_tokens(limits, caller) == 0
                    break
                except RequestsLimited:
                    await asyncio.sleep(0.05)


async def test_a_busy_event_loop_is_no_loss(redis_url: str) -> None:
    """Its timers run out before it reads the answer that came long ago."""
    caller = key(requests_per_minute=60)
    async with limits_in(redis_url) as limits:
        await limits.request(caller)
        asking = asyncio.create_task(limits.request(caller))
        with redis.Redis.from_url(redis_url) as client:
            while float(client.hget("ochat:{alice}:requests", "level") or 0) != 58:
                await asyncio.sleep(0)
                time.sleep(0.8)  # noqa: ASYNC251 - that is what is tested
        assert (await asking)["x-ratelimit-remaining-requests"] == "58"


# The address.


def refusal(url: str) -> str:
    with pytest.raises(StartupError) as stopped:
        check(url)
    return str(stopped.value)


def test_one_that_is_not_there() -> None:
    said = refusal("redis://user:s3cret@127.0.0.1:1/3")
    assert said.startswith("--redis-url redis://127.0.0.1:1/3 cannot be used: ")
    assert "s3cret" not in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--replicaof", "127.0.0.1", "1"], "read only"),
        (["--maxmemory", "1"], "maxmemory"),
    ],
)
def test_one_that_cannot_be_used(tmp_path: Path, options: list[str], said: str) -> None:
    with RedisServer(tmp_path, *options) as server:
        assert said in refusal(server.url)


async def test_passwords_and_unix_sockets(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    with RedisServer(tmp_path, "--unixsocket", str(path), password="s3:cret") as server:
        for url in (
            f"redis://:s3%3Acret@127.0.0.1:{server.port}/2",
            f"unix://:s3%3Acret@{path}?db=2",
        ):
            check(url)
            async with limits_in(url) as limits:
                assert await limits.request(key(requests_per_minute=5))
        assert "Authentication required" in refusal(server.url)
        assert "s3" not in refusal(f"redis://:s3wrong@127.0.0.1:{server.port}")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://h", "redis://h"),
        ("redis://u:p@h:6379/0", "redis://h:6379/0"),
        ("rediss://:p@[::1]:6379/0?ssl_password=p", "rediss://[::1]:6379/0"),
        ("unix://u:p@/run/redis.sock?password=p", "unix:///run/redis.sock"),
    ],
)
def test_an_address_is_shown_without_its_secrets(url: str, said: str) -> None:
    assert shown(url) == said
