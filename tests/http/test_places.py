"""How many connections there may be: in all, from one address, and while TLS is not yet there."""

import asyncio
import contextlib
import ipaddress
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ochat_serve.app import create_app
from ochat_serve.event_loop import EventLoop
from ochat_serve.http_bounds import Bounds
from ochat_serve.http_places import FOR_THIS_MACHINE, Places
from ochat_serve.http_protocol import HttpProtocol
from ochat_serve.settings import Settings
from ochat_serve.tls import Certificate
from tests.certificates import Authority
from tests.fakes import ScriptedEngine, serving
from tests.http.test_bounds import LIVEZ, refusal
from tests.live import LiveServer, RawClient, eventually, live

HERE, STRANGER, GATEWAY = "127.0.0.1", "203.0.113.7", "10.1.2.3"
NEW_LOOPS = pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, EventLoop])


def entered(places: Places, *peers: str | None) -> list[bool]:
    return [places.enter(peer) for peer in peers]


def test_a_stranger_has_half_and_leaves_the_rest_to_the_next() -> None:
    places = Places(8, ())
    assert entered(places, *[STRANGER] * 5) == [True] * 4 + [False]
    assert entered(places, *["203.0.113.8"] * 3) == [True] * 2 + [False]
    places.leave(STRANGER)
    assert not places.enter(STRANGER), "the others leave it three by now"
    assert places.held == 5


def test_an_ipv6_customer_is_one_address() -> None:
    places = Places(8, ())
    customer = [f"2001:db8::{number}" for number in range(5)]
    assert entered(places, *customer) == [True] * 4 + [False]
    assert entered(places, "2001:db8:0:1::1") == [True]
    for address in customer[:4]:
        places.leave(address)
    assert places.held == 1


@pytest.mark.parametrize("peer", [GATEWAY, f"::ffff:{GATEWAY}", HERE, "::1", "::ffff:127.0.0.1"])
def test_gateways_and_this_machine_have_all(peer: str) -> None:
    places = Places(8, (ipaddress.ip_network("10.0.0.0/8"),))
    assert all(entered(places, *[peer] * 8))
    assert entered(places, STRANGER, GATEWAY) == [False, False]


@pytest.mark.parametrize("peer", [HERE, "::1", None])
def test_this_machine_is_let_in_where_nobody_else_is(peer: str | None) -> None:
    places = Places(8, (ipaddress.ip_network("0.0.0.0/0"),))
    assert all(entered(places, *[GATEWAY] * 8))
    assert not places.enter(GATEWAY)
    assert entered(places, *[peer] * (FOR_THIS_MACHINE + 1)) == [True] * FOR_THIS_MACHINE + [False]


def test_one_connection_may_be_the_most() -> None:
    assert entered(Places(1, ()), STRANGER, STRANGER) == [True, False]


# On sockets


class Elsewhere(Places):
    """Everybody comes from one address that is not this machine's."""

    def enter(self, peer: str | None) -> bool:
        assert peer == HERE
        return super().enter(STRANGER)

    def leave(self, peer: str | None) -> None:
        super().leave(STRANGER)


@contextlib.contextmanager
def placed(places: Places, **options: object) -> Iterator[LiveServer]:
    protocol = HttpProtocol.within(Bounds())
    protocol.places = places
    app = create_app(Settings(allowed_hosts=("*",)), serving(ScriptedEngine()))
    with live(app, protocol, **options) as running:
        yield running


def is_alive(port: int, tls: ssl.SSLContext | None = None) -> bool:
    with RawClient(port, tls=tls) as client:
        client.send(LIVEZ + b"\r\n")
        return b"alive" in client.read_until(b"alive")


@NEW_LOOPS
def test_who_finds_no_place_is_told_503(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    places = Elsewhere(6, ())
    with placed(places, new_loop=new_loop) as running:
        with contextlib.ExitStack() as held:
            for _ in range(3):
                held.enter_context(RawClient(running.port))
            assert eventually(lambda: places.held == 3)
            with RawClient(running.port) as another:
                status, error = refusal(another)
            assert (status, error["code"]) == (503, "overloaded")
            assert b"retry-after: 1\r\n" in another.received
        assert eventually(lambda: places.held == 0)
        assert is_alive(running.port)
    assert places.held == 0


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def certificate(authority: Authority) -> Certificate:
    pair = authority.issue("server")
    return Certificate(str(pair.certfile), str(pair.keyfile))


def test_a_connection_counts_before_its_handshake(
    authority: Authority, certificate: Certificate
) -> None:
    places = Elsewhere(6, ())
    with placed(places, new_loop=EventLoop, certificate=certificate) as running:
        with contextlib.ExitStack() as held:
            for _ in range(3):
                held.enter_context(RawClient(running.port))
            assert eventually(lambda: places.held == 3)
            with pytest.raises(ConnectionError), RawClient(running.port) as another:
                another.read_until(b"anything")
        assert eventually(lambda: places.held == 0)
        assert is_alive(running.port, authority.context)


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello"])
def test_a_handshake_that_fails_leaves_its_place(
    authority: Authority, certificate: Certificate, said: bytes
) -> None:
    places = Elsewhere(6, ())
    with placed(places, new_loop=EventLoop, certificate=certificate) as running:
        with RawClient(running.port) as client, is_alive_beside(running.port, authority):
            assert eventually(lambda: places.held == 2)
            client.send(said)
        assert eventually(lambda: places.held == 0)
        assert running.unhandled == []


@contextlib.contextmanager
def is_alive_beside(port: int, authority: Authority) -> Iterator[None]:
    with RawClient(port, tls=authority.context) as client:
        client.send(LIVEZ + b"\r\n")
        client.read_until(b"alive")
        yield
