"""Whoever tries keys is slowed down, by address.

A key that has opened the server from an address opens it from there all the time, so nobody is
locked out by a stranger behind the same address (a gateway, an office).
"""

import ipaddress
from collections import OrderedDict
from collections.abc import Callable

from ochat_serve.errors import RequestsLimited

# Typing errors of a person, and of a program with an old key that tries a few times.
ALLOWED = 10
REFILL_S = 6.0
# Bounds on memory: what was seen longest ago goes first.
_MAX_ADDRESSES = 10_000
_MAX_KNOWN = 10_000


class FailedAttempts:
    """``allowed`` wrong keys at once from one address, then one every ``REFILL_S`` seconds."""

    def __init__(self, clock: Callable[[], float], allowed: int = ALLOWED) -> None:
        self._clock = clock
        self._allowed = allowed
        # address -> (attempts left, when)
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._known: OrderedDict[tuple[str, bytes], None] = OrderedDict()

    def check(self, address: str, digest: bytes) -> None:
        """Raises ``RequestsLimited`` if this address must wait before its next new key."""
        if not self._left or (address, digest) in self._known:
            return
        left = self._refilled(network_of(address))
        if left < 1:
            wait_s = int((1 - left) * REFILL_S) + 1
            raise RequestsLimited(
                "Too many wrong API keys came from your address. "
                f"Please try again in {wait_s} seconds.",
                code="too_many_failed_attempts",
                retry_after_s=wait_s,
            )

    def failed(self, address: str) -> None:
        network = network_of(address)
        self._left[network] = (self._refilled(network) - 1, self._clock())
        self._left.move_to_end(network)
        if len(self._left) > _MAX_ADDRESSES:
            self._left.popitem(last=False)

    def succeeded(self, address: str, digest: bytes) -> None:
        self._known[address, digest] = None
        self._known.move_to_end((address, digest))
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)

    def _refilled(self, network: str) -> float:
        left, then = self._left.get(network, (self._allowed, self._clock()))
        return min(self._allowed, left + (self._clock() - then) / REFILL_S)


def network_of(address: str) -> str:
    """One person's addresses: of IPv6 all of the /64 that an IPv6 customer gets."""
    if ":" not in address:
        return address
    try:
        return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))
    except ValueError:
        return address
