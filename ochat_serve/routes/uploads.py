"""How much there may be of request bodies: of each, and of all that come at the same time.

A body is held before anything else is known of its request, so the limits on requests do not
bound it.
"""

from collections.abc import Hashable

from ochat_serve.errors import ApiError, BodyTooLarge, Unavailable
from ochat_serve.shares import Shares

# So many of the largest ones: 256 MiB, unless --max-body-mb says otherwise.
BODIES = 64
_CLOSE = {"connection": "close"}


class Uploads:
    """All of one process."""

    def __init__(self, max_body_bytes: int) -> None:
        self.max_body_bytes = max_body_bytes
        self.bytes = Shares(BODIES * max_body_bytes)


class Upload:
    """One body, by ``who`` sends it.  What it holds is given back at the end of a ``with``."""

    def __init__(self, uploads: Uploads, who: Hashable) -> None:
        self._uploads = uploads
        self._who = who
        self._chunks: list[bytes] = []
        self._held = 0
        self.size = 0
        self.refusal: ApiError | None = None

    def add(self, chunk: bytes) -> None:
        """Hold it, or count it only, once there is a ``refusal``."""
        self.size += len(chunk)
        if self.refusal is None:
            self.refusal = self._refusal(len(chunk))
            if self.refusal is None:
                self._held += len(chunk)
                self._chunks.append(chunk)
            else:
                self._drop()

    def whole(self) -> bytes:
        """Raises the ``refusal``."""
        if self.refusal is not None:
            raise self.refusal
        return b"".join(self._chunks)

    def __enter__(self) -> "Upload":
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()

    def _refusal(self, more: int) -> ApiError | None:
        most = self._uploads.max_body_bytes
        if self.size > most:
            return BodyTooLarge(
                f"The request body is larger than this server accepts ({most} bytes).",
                headers=_CLOSE,
            )
        if not self._uploads.bytes.take(self._who, more):
            return Unavailable(
                "The server is reading as much of request bodies as it takes at a time. "
                "Please try again in a few seconds.",
                code="overloaded",
                retry_after_s=1,
                headers=_CLOSE,
            )
        return None

    def _drop(self) -> None:
        if self._held:
            self._uploads.bytes.give_back(self._who, self._held)
        self._held = 0
        self._chunks.clear()
