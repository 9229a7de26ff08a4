"""Who sends a request, and what they may: the words that keys, limits, usage and log share."""

import hashlib
from dataclasses import dataclass
from typing import Literal, Self

Role = Literal["user", "admin"]
LogContent = Literal["none", "truncated", "full"]
# Names of keys stand in logs, metrics, files and header values.
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What one key may use, summed over all that send it.  None is no limit.

    Days and months are UTC's.  Tokens are those of prompts and answers together.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    parallel_requests: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None


NO_LIMITS = KeyLimits()


@dataclass(frozen=True, slots=True)
class Caller:
    """``name`` is the key's, None where no keys are set.  ``models``: those it may use; empty
    for all.  ``log_content`` overrides the server's; None leaves it."""

    name: str | None
    role: Role = "user"
    limits: KeyLimits = NO_LIMITS
    models: tuple[str, ...] = ()
    log_content: LogContent | None = None

    @property
    def is_limited(self) -> bool:
        return self.limits != NO_LIMITS

    @property
    def is_admin(self) -> bool:
        return self.role == "admin"


@dataclass(frozen=True, slots=True)
class Key:
    """One secret of a caller; only its digest is kept.  ``expires`` is Unix time."""

    digest: bytes
    caller: Caller
    expires: float | None = None

    @classmethod
    def of(cls, secret: str, caller: Caller) -> Self:
        """``secret`` as it was typed: Python reads bytes that are no UTF-8 as lone surrogates."""
        return cls(digest_of(secret.encode("utf-8", "surrogateescape")), caller)


def digest_of(secret: bytes) -> bytes:
    """SHA-256.  Secrets are long and random, so a slow hash would protect nothing more."""
    return hashlib.sha256(secret).digest()
