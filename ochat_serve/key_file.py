"""The file of named keys: JSON, written by ``python -m ochat_serve.keys`` and readable for people.

    {"version": 1,
     "keys": {"alice": {"role": "user", "requests_per_minute": 60, "models": [],
                        "secrets": [{"sha256": "...", "created": "...", "expires": null}]}}}

A name has several secrets while one replaces another.
"""

import asyncio
import json
import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ochat_serve.caller import NAME_PATTERN, Caller, Key, KeyLimits, LogContent, Role

_Limit = Annotated[int, Field(ge=1)] | None
_MAX_BYTES = 16 * 2**20


class KeyFileError(Exception):
    """What is wrong with the file, in one sentence."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class Secret(_Part):
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    created: AwareDatetime
    expires: AwareDatetime | None = None


class Entry(_Part):
    """All that the file says of one name."""

    role: Role = "user"
    requests_per_minute: _Limit = None
    tokens_per_minute: _Limit = None
    parallel_requests: _Limit = None
    tokens_per_day: _Limit = None
    tokens_per_month: _Limit = None
    models: list[str] = []
    log_content: LogContent | None = None
    secrets: list[Secret]

    def caller(self, name: str) -> Caller:
        limits = KeyLimits(*(getattr(self, field) for field in KeyLimits.__slots__))
        return Caller(name, self.role, limits, tuple(self.models), self.log_content)


class Content(_Part):
    version: Literal[1] = 1
    keys: dict[Annotated[str, StringConstraints(pattern=rf"^{NAME_PATTERN}$")], Entry] = {}

    def for_ring(self) -> tuple[Key, ...]:
        return tuple(
            Key(
                bytes.fromhex(secret.sha256),
                caller,
                secret.expires.timestamp() if secret.expires else None,
            )
            for name, entry in self.keys.items()
            for caller in (entry.caller(name),)  # one, whichever of its secrets is sent
            for secret in entry.secrets
        )


class KeyFile:
    """One key file.  Methods block for as long as a small file takes.

    ``check`` raises ``KeyFileError`` for a valid content that this server cannot honour.
    """

    def __init__(self, path: str, check: Callable[[Content], None] = lambda content: None) -> None:
        self.path = Path(path)
        self._check = check
        self._seen: tuple[int, ...] | None = None

    def read(self) -> Content:
        """Raises ``KeyFileError``."""
        state = self._state()
        try:
            with self.path.open("rb") as file:
                text = file.read(_MAX_BYTES)
            self._seen = state  # what could not be read, for whatever moment, is still to be seen
            content = Content.model_validate_json(text)
        except OSError as error:
            raise KeyFileError(
                f"The key file {self.path} cannot be read: {error.strerror}."
            ) from error
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise KeyFileError(
                f"The key file {self.path} is not valid: {where}{': ' * bool(where)}{first['msg']}."
            ) from error
        self._check(content)
        return content

    @property
    def changed(self) -> bool:
        """Whether it is another file, or has another content, than when it was last read."""
        return self._state() != self._seen

    def _state(self) -> tuple[int, ...] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ctime_ns, found.st_mtime_ns, found.st_size, found.st_ino

    @contextmanager
    def edited(self) -> Iterator[Content]:
        """The content to change, written back at the end, whole or not at all.  A file that does
        not exist is empty.  Links are followed, and stay.  Raises ``KeyFileError``."""
        path = Path(os.path.realpath(self.path))
        if not path.parent.is_dir():  # the lock would make it
            raise KeyFileError(f"There is no folder {path.parent} for a key file.")
        try:
            with FileLock(f"{path}.lock", mode=0o600, timeout=10):
                content = self.read() if path.exists() else Content()
                yield content
                _write(path, content)
        except TimeoutError as error:
            raise KeyFileError(f"The key file {self.path} is being edited elsewhere.") from error
        except OSError as error:
            raise KeyFileError(
                f"The key file {self.path} cannot be written: {error.strerror}."
            ) from error


def _write(path: Path, content: Content) -> None:
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    told = {"version": 1, **content.model_dump(mode="json", exclude_defaults=True)}
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(json.dumps(told, indent=1) + "\n")
        file.flush()
        with suppress(FileNotFoundError):
            _give(file.fileno(), path.stat())
        os.fsync(file.fileno())
    new.replace(path)


def _give(descriptor: int, old: os.stat_result) -> None:
    """The owner, group and mode of the file before: who could read it still can, whoever edits
    it.  Where that is not the editor's to give, the file is the editor's."""
    for owner in ((-1, old.st_gid), (old.st_uid, -1)):
        with suppress(PermissionError):
            os.fchown(descriptor, *owner)
    os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


async def watch(
    file: KeyFile,
    apply: Callable[[tuple[Key, ...]], None],
    complain: Callable[[str], None],
    pause: Callable[[float], Awaitable[bool]],
    interval_s: float = 0.5,
) -> None:
    """Hand the keys of every new content to ``apply``; of a trouble ``complain`` once, however
    often it is met, and leave the keys as they are.  ``pause`` is ``Nudge.within``: after
    a nudge the file is read, changed or not."""
    trouble = ""
    while True:
        nudged = await pause(interval_s)
        try:
            if nudged or await asyncio.to_thread(lambda: file.changed):
                apply((await asyncio.to_thread(file.read)).for_ring())
            trouble = ""
        except KeyFileError as error:
            if nudged or str(error) != trouble:
                trouble = str(error)
                complain(f"{trouble} The keys stay as they were.")
