"""A store for all that nobody can empty.

Whoever takes from it may hold half of what the others leave, at most.  So the first one has half
of all if need be, and the next one still finds something.
"""

from collections.abc import Hashable


class Shares:
    """``most`` of anything, in all."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0
        self._held_by: dict[Hashable, int] = {}

    def take(self, who: Hashable, amount: int) -> bool:
        """Whether ``who`` has got it."""
        own = self._held_by.get(who, 0)
        left_by_others = self.most - (self.held - own)
        if 2 * (own + amount) > left_by_others + 1:  # of an odd number the larger half
            return False
        self.hold(who, amount)
        return True

    def hold(self, who: Hashable, amount: int) -> None:
        """Take it without asking."""
        self._held_by[who] = self._held_by.get(who, 0) + amount
        self.held += amount

    def give_back(self, who: Hashable, amount: int) -> None:
        self.held -= amount
        self._held_by[who] -= amount
        if not self._held_by[who]:
            del self._held_by[who]
