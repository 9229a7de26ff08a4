"""The keys that open the server at this moment.  Only their digests are in memory."""

from collections.abc import Callable, Iterable

from ochat_serve.caller import Caller, Key, digest_of
from ochat_serve.errors import InvalidApiKey

_MISSING = (
    "You didn't provide an API key. Send it in an Authorization header: "
    "'Authorization: Bearer YOUR_KEY'."
)
_WRONG = "Incorrect API key provided."
_EXPIRED = "This API key has expired."


def presented(authorization: bytes | None) -> bytes:
    """The digest of the key in an ``Authorization`` header; bytes of any encoding are fine.

    Raises ``InvalidApiKey`` where there is none.
    """
    scheme, _, key = (authorization or b"").partition(b" ")
    if scheme.lower() != b"bearer" or not key.strip():
        raise InvalidApiKey(_MISSING)
    return digest_of(key.strip())


class KeyRing:
    """``fixed`` keys, and those of a file that may change.

    Keys are looked up by their digests: what the time of a lookup could tell is a part of a
    digest, which says nothing about the key.
    """

    def __init__(self, fixed: Iterable[Key], now: Callable[[], float]) -> None:
        self._fixed = tuple(fixed)
        self._now = now
        self.replace(())

    def replace(self, keys: Iterable[Key]) -> None:
        """The file's keys are these now.  The fixed ones stay."""
        self._keys = {key.digest: key for key in (*keys, *self._fixed)}

    def identify(self, digest: bytes) -> Caller:
        """Raises ``InvalidApiKey``."""
        key = self._keys.get(digest)
        if key is None:
            raise InvalidApiKey(_WRONG)
        if key.expires is not None and key.expires <= self._now():
            raise InvalidApiKey(_EXPIRED)
        return key.caller
