"""How many connections there may be: in all, and from one address.

A connection costs a place as soon as it is accepted, before anything is known of who asks; so
one stranger must not be able to hold all of them.
"""

import ipaddress
from collections.abc import Sequence

from ochat_serve.failed_attempts import network_of
from ochat_serve.setting_values import Network
from ochat_serve.shares import Shares

# Beyond the most: for whoever looks after the server on its own machine.  A health check that is
# refused would have a server restarted that is only busy.
FOR_THIS_MACHINE = 16


class Places:
    """An address (of IPv6 its /64) may hold half of what the others leave; ``gateways`` and this
    machine as many as there are."""

    def __init__(self, most: int, gateways: Sequence[Network]) -> None:
        self.most = most
        self._gateways = gateways
        self._shares = Shares(most)

    @property
    def held(self) -> int:
        return self._shares.held

    def enter(self, peer: str | None) -> bool:
        """Whether there is a place for a connection from there; None is no address at all."""
        address = _address(peer)
        near = address is None or address.is_loopback
        if self.held >= self.most + (FOR_THIS_MACHINE if near else 0):
            return False
        who = network_of(str(address))
        if near or any(address in gateway for gateway in self._gateways):
            self._shares.hold(who, 1)
            return True
        return self._shares.take(who, 1)

    def leave(self, peer: str | None) -> None:
        self._shares.give_back(network_of(str(_address(peer))), 1)


def _address(peer: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    if peer is None:
        return None
    address = ipaddress.ip_address(peer.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
