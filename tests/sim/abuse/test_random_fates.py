"""A thousand requests, each with a fate of its own: nothing is lost, and nothing is left."""

import asyncio
from collections import Counter
from typing import Any

from ochat_serve.usage.counters import COUNTERS
from tests.live import eventually
from tests.sim.abuse.clients import Answer, by_many
from tests.sim.abuse.fates import FATES, LIMITED, Request, drawn
from tests.sim.abuse.guarded import KEYS, Guarded

COUNT = 1_000
CLIENTS = 160  # more than there are places


def test_a_thousand_requests_of_random_fate(guarded: Guarded) -> None:
    requests = drawn(COUNT, seed=4)
    answers = asyncio.run(
        by_many(requests, lambda connection, request: request.meet(connection),
                port=guarded.port, clients=CLIENTS)
    )  # fmt: skip
    met = list(zip(requests, answers, strict=True))
    for request, answer in met:
        assert answer.status in FATES[request.fate].ends, (request.fate, answer)

    # Nothing is left in the engine, on a connection, or on anybody's account.
    assert guarded.is_at_rest()
    assert guarded.has_all_places()
    assert guarded.ask("one-at-a-time").status_code == 200

    # One line for each, and a true one.
    numbers = {request.id for request in requests}

    def lines() -> list[dict[str, Any]]:
        return [line for line in guarded.lines() if line["request_id"] in numbers]

    assert eventually(lambda: len(lines()) >= COUNT)
    by_number = {line["request_id"]: line for line in lines()}
    assert len(by_number) == len(lines()) == COUNT
    for request, answer in met:
        check(request, answer, by_number[request.id])
    check_limits(met)

    # The ledger is the sum of the log.
    assert eventually(guarded.accounts_are_the_logs_sums)
    check_usage(guarded)
    check_quota(guarded)


def check(request: Request, answer: Answer, line: dict[str, Any]) -> None:
    """What the log says of it."""
    assert line["outcome"] == FATES[request.fate].ends[answer.status], (request.fate, line)
    assert line.get("key") == request.known_key
    if answer.status is not None:
        assert line["status"] == answer.status
    if line["outcome"] == "finished":
        assert None not in line["finish_reasons"]
    if request.fate == "late":
        assert line["error"] == "deadline_exceeded"
        assert b"deadline_exceeded" in answer.body
        assert b'"finish_reason":"' not in answer.body


def check_limits(met: list[tuple[Request, Answer]]) -> None:
    """Each limit has let some through and held some up."""
    seen = Counter((request.key, answer.status) for request, answer in met)
    for key in LIMITED:
        assert seen[key, 200], key
        assert seen[key, 429], key


def check_usage(guarded: Guarded) -> None:
    """What the route tells is what is stored."""
    told = guarded.get("/v1/usage?key=*").json()["data"]
    accounts = {(each["key"], each["day"]): each for each in told}
    for row in guarded.stored():
        if row.key != "ops":  # who asks just now
            account = accounts[row.key, row.day]
            assert [account[name] for name in COUNTERS] == list(row.counters.values())


def check_quota(guarded: Guarded) -> None:
    """The last request may go over it, but only one."""
    used = [
        line["prompt_tokens"] + line["completion_tokens"]
        for line in guarded.lines()
        if line.get("key") == "small-quota" and "prompt_tokens" in line
    ]
    quota = KEYS["small-quota"]["tokens_per_day"]
    assert quota <= sum(used) < quota + max(used)
