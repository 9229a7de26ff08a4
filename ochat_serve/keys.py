"""API keys.  Only digests are kept in memory; comparing takes the same time for every key."""

import hashlib
import hmac
from collections.abc import Iterable

from ochat_serve.errors import InvalidApiKey

_MISSING = (
    "You didn't provide an API key. Send it in an Authorization header: "
    "'Authorization: Bearer YOUR_KEY'."
)
_WRONG = "Incorrect API key provided."


class ApiKeys:
    """The keys that may use the server.  No keys at all: everybody may."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(_digest(_bytes(key)) for key in keys)

    def check(self, authorization: bytes | None) -> str | None:
        """The name of the key in an ``Authorization`` header, None if no keys are set.

        Raises ``InvalidApiKey``.  Header bytes of any encoding are fine.
        """
        if not self._digests:
            return None
        if authorization is None:
            raise InvalidApiKey(_MISSING)
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() != b"bearer" or not key.strip():
            raise InvalidApiKey(_MISSING)
        digest = _digest(key.strip())
        # Every digest is compared, so the time tells nothing about which one matched.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise InvalidApiKey(_WRONG)
        return f"key-{matches.index(True) + 1}"


def _bytes(key: str) -> bytes:
    """The bytes that were typed: Python reads those that are no UTF-8 as lone surrogates."""
    return key.encode("utf-8", "surrogateescape")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
