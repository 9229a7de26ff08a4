"""The key ring: who may pass, under which name, and what stays in memory."""

import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from ochat_serve.caller import Caller, Key
from ochat_serve.errors import InvalidApiKey
from ochat_serve.key_ring import KeyRing, presented

FIRST, SECOND, FOREIGN = "sk-first", "sk-second", "ключ-é"
NOW = 1_000.0


def ring(*secrets: str) -> KeyRing:
    keys = [Key.of(key, Caller(f"key-{number}")) for number, key in enumerate(secrets, 1)]
    return KeyRing(keys, lambda: NOW)


def name(keys: KeyRing, authorization: bytes | None) -> str | None:
    return keys.identify(presented(authorization)).name


KEYS = ring(FIRST, SECOND, FOREIGN)
MISSING = "You didn't provide an API key."
WRONG = "Incorrect API key provided."


@pytest.mark.parametrize(
    ("authorization", "expected"),
    [
        (b"Bearer sk-first", "key-1"),
        (b"Bearer sk-second", "key-2"),
        (b"bearer sk-first", "key-1"),
        (b"BEARER sk-first", "key-1"),
        (b"Bearer  sk-first ", "key-1"),
        (b"Bearer \tsk-first", "key-1"),
        (f"Bearer {FOREIGN}".encode(), "key-3"),
    ],
)
def test_the_right_key_has_a_name(authorization: bytes, expected: str):
    """The name stands in the log; the key must not."""
    assert name(KEYS, authorization) == expected


@pytest.mark.parametrize(
    "authorization",
    [
        b"Bearer sk-firs",
        b"Bearer sk-first2",
        b"Bearer SK-FIRST",
        b"Bearer sk-first sk-second",
        b"Bearer sk-first,",
        b"Bearer Bearer sk-first",
        b"Bearer sk-first\0",
        b"Bearer " + FOREIGN.encode("utf-16"),
        b"Bearer \xff\xfe",
        b"Bearer " + "ключ".encode(),
        b"Bearer " + b"k" * 1_000_000,
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_wrong_key(authorization: bytes):
    with pytest.raises(InvalidApiKey) as refusal:
        name(KEYS, authorization)
    # Not a byte of what was sent: it may be almost right.
    assert refusal.value.message == WRONG


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        b"",
        b" ",
        b"Bearer",
        b"Bearer ",
        b"Bearer   ",
        b"sk-first",
        b" Bearer sk-first",
        b"Bearersk-first",
        b"Bearer\tsk-first",
        b"Basic sk-first",
        b"\xff\xfe sk-first",
    ],
)
def test_no_key_at_all(authorization: bytes | None):
    with pytest.raises(InvalidApiKey) as refusal:
        name(KEYS, authorization)
    assert refusal.value.message.startswith(MISSING)
    assert "sk-first" not in refusal.value.message


def test_a_blank_key_opens_nothing():
    """``--api-keys ""`` must not mean that an empty header is enough."""
    for authorization in (b"Bearer ", b"Bearer", b"", None):
        with pytest.raises(InvalidApiKey):
            name(ring(""), authorization)


def test_without_keys_nobody_passes():
    """A key file from which the last key was revoked closes the server, it does not open it."""
    with pytest.raises(InvalidApiKey):
        name(ring(), b"Bearer x")


def test_a_files_keys_change_and_the_fixed_ones_stay():
    keys = ring(FIRST)
    keys.replace([Key.of("sk-alice", Caller("alice", "admin"))])
    assert name(keys, b"Bearer sk-alice") == "alice"
    keys.replace([Key.of("sk-bob", Caller("bob"))])
    assert [name(keys, f"Bearer {key}".encode()) for key in (FIRST, "sk-bob")] == ["key-1", "bob"]
    with pytest.raises(InvalidApiKey, match="Incorrect"):
        name(keys, b"Bearer sk-alice")


@pytest.mark.parametrize(("expires", "opens"), [(NOW + 1, True), (NOW, False), (NOW - 1, False)])
def test_a_key_ends(expires: float, opens: bool):
    key = Key.of("sk-old", Caller("old"))
    keys = KeyRing([Key(key.digest, key.caller, expires)], lambda: NOW)
    if opens:
        assert name(keys, b"Bearer sk-old") == "old"
    else:
        with pytest.raises(InvalidApiKey, match="expired"):
            name(keys, b"Bearer sk-old")


def test_a_key_that_is_no_text_works_by_its_bytes():
    """An environment variable can hold any bytes; Python shows them as lone surrogates."""
    typed = b"sk-\xff".decode("utf-8", "surrogateescape")
    assert name(ring(typed), b"Bearer sk-\xff") == "key-1"


def everything(value: Any) -> Iterator[Any]:
    """``value`` and what can be reached from it."""
    yield value
    if isinstance(value, dict):
        children = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        children = list(value)
    else:
        children = list(getattr(value, "__dict__", {}).values())
    for child in children:
        yield from everything(child)


def test_plain_keys_are_not_kept():
    secrets = ["sk-very-secret", "sk-also-secret"]
    keys = ring(*secrets)
    assert name(keys, b"Bearer sk-also-secret") == "key-2"
    keys._now = None  # a function cannot be pickled
    told = [repr(item) for item in everything(keys)] + [repr(pickle.dumps(keys))]
    assert len(told) > len(secrets)
    assert not [item for item in told if "secret" in item]
