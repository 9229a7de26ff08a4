"""Who takes all that can be had leaves something to the next one."""

from hypothesis import given
from hypothesis import strategies as st

from ochat_serve.shares import Shares


def taken(shares: Shares, who: str) -> int:
    """All that ``who`` gets, one by one."""
    before = shares.held
    while shares.take(who, 1):
        pass
    return shares.held - before


def test_each_gets_half_of_what_the_others_leave() -> None:
    shares = Shares(100)
    assert [taken(shares, who) for who in "abcdefgh"] == [50, 25, 13, 6, 3, 2, 1, 0]
    shares.give_back("a", 50)
    assert taken(shares, "b") == 38 - 25, "the others hold 25"
    assert taken(shares, "h") == 19, "the others hold 63"


def test_the_last_one_is_not_out_of_reach() -> None:
    assert taken(Shares(1), "a") == 1


steps = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40)), max_size=60)


@given(st.integers(1, 200), steps)
def test_what_is_held_is_never_more_than_the_most(most: int, asked: list[tuple[str, int]]) -> None:
    shares = Shares(most)
    got = [(who, amount) for who, amount in asked if shares.take(who, amount)]
    assert shares.held == sum(amount for _, amount in got) <= most
    for who, amount in got:
        shares.give_back(who, amount)
    assert shares.held == 0
    assert taken(shares, "d") == taken(Shares(most), "d"), "nothing is remembered of the others"
