"""What is measured: each case is a load with a name."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scripts.benchmark.load import body, conversation, words

Lanes = Sequence[Sequence[bytes]]
PROMPT_WORDS = 100
TURNS = 20
# Twenty turns of this many words a message are about 6,000 tokens.
TURN_WORDS = 150
SHORT_TOKENS = 2
LONG_WORDS = 99_900


@dataclass(frozen=True)
class Case:
    """``lanes(model)`` makes the requests: one list a connection, sent in order.
    ``beside(model)`` are sent at the same time and not measured."""

    name: str
    lanes: Callable[[str], Lanes]
    beside: Callable[[str], Lanes] = lambda model: ()


def streams(count: int, tokens: int, rounds: int = 1) -> Case:
    """``count`` answers at once, streamed."""

    def lanes(model: str) -> Lanes:
        rng = random.Random(count)
        return [
            [body([_user(words(rng, PROMPT_WORDS))], tokens, model) for _ in range(rounds)]
            for _ in range(count)
        ]

    return Case(f"streams_{count}", lanes)


def short(count: int, each: int) -> Case:
    """Requests of which the answer is two tokens: what a request costs beside its tokens."""

    def lanes(model: str) -> Lanes:
        rng = random.Random("short")
        return [
            [body([_user(words(rng, PROMPT_WORDS))], SHORT_TOKENS, model) for _ in range(each)]
            for _ in range(count)
        ]

    return Case("short", lanes)


def twenty_turns(count: int, each: int) -> Case:
    """Long conversations that were never seen before."""

    def lanes(model: str) -> Lanes:
        rng = random.Random(2)
        return [
            [body(conversation(rng, TURNS, TURN_WORDS), SHORT_TOKENS, model) for _ in range(each)]
            for _ in range(count)
        ]

    return Case("twenty_turns", lanes)


def growing(count: int) -> Case:
    """Conversations that come back with one more turn, twenty times."""

    def lanes(model: str) -> Lanes:
        rng = random.Random(3)
        whole = [conversation(rng, TURNS, TURN_WORDS) for _ in range(count)]
        return [
            [body(messages[:end], SHORT_TOKENS, model) for end in range(1, 2 * TURNS, 2)]
            for messages in whole
        ]

    return Case("growing", lanes)


def short_beside_long(count: int, each: int) -> Case:
    """Short requests, one at a time, while ``count`` prompts of 100,000 tokens are in flight."""

    def lanes(model: str) -> Lanes:
        rng = random.Random(5)
        return [[body([_user(words(rng, 20))], SHORT_TOKENS, model) for _ in range(each)]]

    def beside(model: str) -> Lanes:
        rng = random.Random(6)
        return [[body([_user(words(rng, LONG_WORDS))], SHORT_TOKENS, model)] for _ in range(count)]

    return Case(f"short_beside_{count}_long", lanes, beside)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def warm_up(model: str) -> Lanes:
    rng = random.Random(4)  # texts that no case uses
    return [[body([_user(words(rng, PROMPT_WORDS))], SHORT_TOKENS, model)] for _ in range(32)]


FULL = (
    streams(1, 256, rounds=2),
    streams(32, 256, rounds=2),
    streams(256, 256, rounds=2),
    streams(1024, 128),
    short(32, 30),
    twenty_turns(16, 12),
    growing(16),
    short_beside_long(0, 20),
    short_beside_long(4, 20),
)
# Does it run at all?  For the tests.
SMOKE = (streams(2, 8), short(2, 2), growing(1))
# The demo model on a laptop's CPU is slow: a few streams tell what HTTP adds to AsyncLLM.
REAL = (streams(1, 128), streams(8, 256))
GPU = (streams(1, 256), streams(32, 256, rounds=2), streams(256, 256, rounds=2), short(32, 30))
