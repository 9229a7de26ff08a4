"""Keys: who may pass, under which name, and what stays in memory."""

import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from ochat_serve.errors import InvalidApiKey
from ochat_serve.keys import ApiKeys

FIRST, SECOND, FOREIGN = "sk-first", "sk-second", "ключ-é"
KEYS = ApiKeys([FIRST, SECOND, FOREIGN])
MISSING = "You didn't provide an API key."
WRONG = "Incorrect API key provided."


@pytest.mark.parametrize(
    ("authorization", "name"),
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
def test_the_right_key_has_a_name(authorization: bytes, name: str):
    """The name stands in the log; the key must not."""
    assert KEYS.check(authorization) == name


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
        KEYS.check(authorization)
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
        KEYS.check(authorization)
    assert refusal.value.message.startswith(MISSING)
    assert "sk-first" not in refusal.value.message


@pytest.mark.parametrize("authorization", [None, b"", b"Bearer x", b"Basic eDp5", b"\xff"])
def test_without_keys_everybody_may(authorization: bytes | None):
    assert ApiKeys([]).check(authorization) is None


def test_a_blank_key_opens_nothing():
    """``--api-keys ""`` must not mean that an empty header is enough."""
    blank = ApiKeys([""])
    for authorization in (b"Bearer ", b"Bearer", b"", None):
        with pytest.raises(InvalidApiKey):
            blank.check(authorization)


def test_a_key_that_is_no_text_works_by_its_bytes():
    """An environment variable can hold any bytes; Python shows them as lone surrogates."""
    typed = b"sk-\xff".decode("utf-8", "surrogateescape")
    assert ApiKeys([typed]).check(b"Bearer sk-\xff") == "key-1"


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
    keys = ApiKeys(iter(secrets))
    assert keys.check(b"Bearer sk-also-secret") == "key-2"
    told = [repr(item) for item in everything(keys)] + [repr(pickle.dumps(keys))]
    assert len(told) > len(secrets)
    assert not [item for item in told if "secret" in item]
