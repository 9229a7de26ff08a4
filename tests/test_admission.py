"""Who goes into the engine next, and who is turned away."""

import random

import pytest

from ochat_serve.admission import Admission, Ticket
from ochat_serve.errors import Unavailable

STEP = 1_000


def admission(slots: int = 4, max_queue: int = 100, max_queue_tokens: int = 10**6) -> Admission:
    return Admission(
        slots=slots, max_queue=max_queue, max_queue_tokens=max_queue_tokens, step_tokens=STEP
    )


class Clients:
    """Requests by name; notes the order in which they are admitted and refused."""

    def __init__(self, place: Admission) -> None:
        self._place = place
        self.admitted: list[str] = []
        self.refused: list[str] = []
        self._tickets: dict[str, Ticket] = {}

    def come(self, name: str, key: str | None = "a", tokens: int = 10, places: int = 1) -> None:
        ticket = self._place.enter(key, tokens, places)
        self._tickets[name] = ticket
        if ticket.admitted:
            self._came_in(name)
        else:
            ticket.on_admitted = lambda: self._came_in(name)
            ticket.on_refused = lambda error: self.refused.append(name)

    def _came_in(self, name: str) -> None:
        self.admitted.append(name)

    def first_token(self, name: str) -> None:
        self._place.prefilled(self._tickets[name])

    def go(self, name: str, tokens: int = 256) -> None:
        self._place.leave(self._tickets[name], tokens)


def test_places_are_bounded_and_given_on_in_order() -> None:
    place = admission(slots=2)
    clients = Clients(place)
    for name in ("1", "2", "3", "4"):
        clients.come(name, key=None)
    assert clients.admitted == ["1", "2"]
    assert (place.running, place.waiting) == (2, 2)
    clients.go("2")
    assert clients.admitted == ["1", "2", "3"]
    clients.go("2")  # once is enough
    clients.go("1")
    assert clients.admitted == ["1", "2", "3", "4"]
    clients.go("3")
    clients.go("4")
    assert (place.running, place.waiting) == (0, 0)


def test_choices_are_places_and_a_large_request_is_not_overtaken() -> None:
    clients = Clients(admission(slots=4))
    clients.come("three", key=None, places=3)
    clients.come("two", key=None, places=2)
    clients.come("one", key=None)
    assert clients.admitted == ["three"]
    clients.go("three")
    assert clients.admitted == ["three", "two", "one"]
    clients.come("all", key=None, places=100)  # more than there are: it gets all
    clients.go("two")
    assert "all" not in clients.admitted
    clients.go("one")
    assert "all" in clients.admitted


def test_who_leaves_the_queue_is_never_admitted() -> None:
    place = admission(slots=1)
    clients = Clients(place)
    for name in ("1", "2", "3"):
        clients.come(name, key=None)
    clients.go("2", 0)
    clients.go("1")
    assert clients.admitted == ["1", "3"]
    clients.go("3")
    assert (place.running, place.waiting) == (0, 0)


def test_leaving_lets_those_behind_go() -> None:
    clients = Clients(admission(slots=2))
    clients.come("one", key=None)
    clients.come("two", key=None, places=2)
    clients.come("three", key=None)
    clients.go("two", 0)
    assert clients.admitted == ["one", "three"]


def test_a_flood_leaves_a_place_for_another_key() -> None:
    clients = Clients(admission(slots=4))
    for number in range(50):
        clients.come(f"a{number}", "a")
    assert len(clients.admitted) == 3
    clients.come("b0", "b")
    assert clients.admitted[-1] == "b0"
    clients.come("b1", "b")  # it has one now: it waits, like everybody
    assert clients.admitted[-1] == "b0"


def test_keys_take_turns() -> None:
    clients = Clients(admission(slots=2))
    for number in range(20):
        clients.come(f"a{number}", "a")
    for number in range(20):
        clients.come(f"b{number}", "b")
    while len(clients.admitted) < 22:
        clients.go(clients.admitted[-2])
    last = [name[0] for name in clients.admitted[2:]]
    assert abs(last.count("a") - last.count("b")) <= 2


def test_turns_are_weighed_by_tokens() -> None:
    """One asks with long prompts and gets long answers, the other with short ones: the tokens
    are shared evenly, not the requests."""
    place = admission(slots=1, max_queue=10_000)
    clients = Clients(place)
    for number in range(1_000):
        clients.come(f"a{number}", "a", tokens=900)
        clients.come(f"b{number}", "b", tokens=90)
    served = {"a": 0, "b": 0}
    for _ in range(500):
        name = clients.admitted[-1]
        prompt, answer = (900, 300) if name[0] == "a" else (90, 30)
        served[name[0]] += prompt + answer
        clients.go(name, answer)
    assert served["a"] == pytest.approx(served["b"], rel=0.05)


def test_nobody_saves_up_time() -> None:
    clients = Clients(admission(slots=1))
    for number in range(20):
        clients.come(f"a{number}", "a")
    for _ in range(10):
        clients.go(clients.admitted[-1])
    for number in range(20):  # it was away until now
        clients.come(f"b{number}", "b")
    for _ in range(10):
        clients.go(clients.admitted[-1])
    assert [name[0] for name in clients.admitted[-8:]].count("b") == 4


def test_prompts_in_prefill_are_bounded_so_that_a_newcomers_is_soon_read() -> None:
    clients = Clients(admission(slots=100))
    for number in range(10):
        clients.come(f"a{number}", "a", tokens=STEP)
    assert clients.admitted == ["a0", "a1"]
    clients.come("b0", "b", tokens=5)
    clients.first_token("a0")
    assert clients.admitted[2:] == ["b0"]
    clients.first_token("a1")
    clients.first_token("a1")
    clients.first_token("b0")
    assert clients.admitted[3:] == ["a2", "a3"]
    for name in ("a2", "a3"):  # one that ends before its first token counts as well
        clients.go(name, 0)
    assert clients.admitted[5:] == ["a4", "a5"]


def test_a_prompt_of_any_length_goes_in() -> None:
    clients = Clients(admission())
    clients.come("long", key=None, tokens=100 * STEP)
    clients.come("short", key=None, tokens=1)
    assert clients.admitted == ["long"]
    clients.first_token("long")
    assert clients.admitted == ["long", "short"]


def test_a_full_queue_turns_away() -> None:
    place = admission(slots=1, max_queue=2)
    clients = Clients(place)
    for name in ("1", "2", "3"):
        clients.come(name, key=None)
    with pytest.raises(Unavailable, match="at most 2 requests may wait") as full:
        clients.come("4", key=None)
    assert full.value.code == "overloaded"
    assert full.value.retry_after_s >= 1
    clients.go("1")
    clients.go("2")
    clients.go("3")
    assert (place.running, place.waiting, clients.refused) == (0, 0, [])


def test_tokens_of_waiting_prompts_are_bounded() -> None:
    clients = Clients(admission(slots=1, max_queue_tokens=100))
    clients.come("1", key=None)
    clients.come("2", key=None, tokens=5_000)  # alone it may wait
    with pytest.raises(Unavailable, match="at most requests of 100 prompt tokens may wait"):
        clients.come("3", key=None, tokens=1)
    clients.go("2", 0)
    clients.come("4", key=None, tokens=60)
    with pytest.raises(Unavailable):
        clients.come("5", key=None, tokens=60)


def test_whoever_fills_the_queue_makes_room_for_others() -> None:
    clients = Clients(admission(slots=1, max_queue=6))
    for number in range(7):
        clients.come(f"a{number}", "a")
    for number in range(3):
        clients.come(f"b{number}", "b")
    assert clients.refused == ["a6", "a5", "a4"]
    with pytest.raises(Unavailable):
        clients.come("b3", "b")
    with pytest.raises(Unavailable):
        clients.come("a7", "a")
    clients.come("c0", "c")
    assert len(clients.refused) == 4


def test_whoever_fills_it_with_tokens_makes_room_too() -> None:
    clients = Clients(admission(slots=1, max_queue_tokens=100))
    clients.come("a0", "a")
    clients.come("a1", "a", tokens=80)
    for number in range(3):
        clients.come(f"b{number}", "b", tokens=5)
    clients.come("c0", "c", tokens=10)
    assert clients.refused == ["a1"]


def test_nobody_makes_room_in_vain() -> None:
    clients = Clients(admission(slots=1, max_queue_tokens=100))
    clients.come("first", "d")
    for number in range(5):
        clients.come(f"a{number}", "a")
        clients.come(f"b{number}", "b")
    with pytest.raises(Unavailable):  # too much, even if each of them lost one
        clients.come("c", "c", tokens=45)
    assert clients.refused == []
    for _ in range(10):
        clients.go(clients.admitted[-1])
    for key in "ab":  # in their order
        in_turn = [name for name in clients.admitted if name.startswith(key)]
        assert in_turn == [f"{key}{number}" for number in range(5)]


def test_who_finds_a_place_at_once_needs_no_room_in_the_queue() -> None:
    clients = Clients(admission(slots=4, max_queue=2))
    for number in range(5):
        clients.come(f"a{number}", "a")
    clients.come("b0", "b")
    assert clients.admitted[-1] == "b0"
    assert clients.refused == []


def test_of_few_places_none_is_reserved() -> None:
    clients = Clients(admission(slots=3))
    for number in range(3):
        clients.come(f"a{number}", "a")
    assert len(clients.admitted) == 3


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_nothing_is_lost(seed: int) -> None:
    """Random fates: everybody is admitted, refused or gone, and at the end all is free."""
    rng = random.Random(seed)
    place = admission(slots=5, max_queue=30, max_queue_tokens=20_000)
    clients = Clients(place)
    inside: list[str] = []
    for number in range(3_000):
        if rng.random() < 0.55:
            name = f"{number}"
            key = rng.choice(["a", "a", "a", "b", "c", None])
            try:
                clients.come(name, key, rng.randrange(1, 3_000), rng.choice([1, 1, 1, 2, 8]))
            except Unavailable:
                continue
            inside.append(name)
        elif inside:
            name = rng.choice(inside)
            if rng.random() < 0.5:
                clients.first_token(name)
            inside.remove(name)
            clients.go(name, rng.randrange(500))
        assert 0 <= place.running <= 5
        assert 0 <= place.waiting <= 30
    while inside:
        clients.go(inside.pop(rng.randrange(len(inside))))
    assert (place.running, place.waiting) == (0, 0)
    clients.come("last", "a", tokens=1)
    assert clients.admitted[-1] == "last"


def test_keys_are_forgotten_in_the_end() -> None:
    place = admission()
    clients = Clients(place)
    for number in range(10_100):
        clients.come(str(number), str(number))
        clients.go(str(number))
    assert len(place._lines) == 10_000
