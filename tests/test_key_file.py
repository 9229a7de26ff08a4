"""The key file and the command that manages it; a running server follows it."""

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from ochat_serve import keys
from ochat_serve.caller import Caller, Key, KeyLimits
from ochat_serve.key_file import KeyFile, KeyFileError, watch
from ochat_serve.nudge import Nudge
from tests.live import eventually


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


class Command:
    """``python -m ochat_serve.keys`` on one file."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._path = path
        self._capsys = capsys

    def __call__(self, line: str, code: int = 0) -> tuple[str, str]:
        """What was printed on stdout and on stderr."""
        assert keys.main(["--key-file", str(self._path), *line.split()]) == code
        told = self._capsys.readouterr()
        return told.out.strip(), told.err.strip()


@pytest.fixture
def command(path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(path, capsys)


def in_force(path: Path) -> dict[str, Key]:
    """Name -> its newest key."""
    return {key.caller.name: key for key in KeyFile(str(path)).read().for_ring()}


def test_a_key_is_shown_once_and_only_its_digest_is_kept(path: Path, command: Command) -> None:
    key, told = command("add alice")
    assert re.fullmatch(r"sk-ochat-[A-Za-z0-9_-]{43}", key)
    assert "only now" in told
    assert in_force(path)["alice"] == Key(
        hashlib.sha256(key.encode()).digest(), Caller("alice"), None
    )
    assert key not in path.read_text()
    assert key[9:] not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert "sk-" not in "".join(command("list"))
    assert command("add bob")[0] != key


def test_everything_that_can_be_said_of_a_key(path: Path, command: Command) -> None:
    command(
        "add ops --role admin --expires 2030-01-31 --requests-per-minute 60 "
        "--tokens-per-minute 9000 --parallel-requests 4 --tokens-per-day 100000 "
        "--tokens-per-month 2000000 "
        "--models a b --log-content truncated"
    )
    key = in_force(path)["ops"]
    limits = KeyLimits(60, 9_000, 4, 100_000, 2_000_000)
    assert key.caller == Caller("ops", "admin", limits, ("a", "b"), "truncated")
    assert key.expires == 1_896_048_000
    listed = command("list")[0]
    for told in ("ops", "admin", "2030-01-31", "tokens_per_minute=9000", "a, b"):
        assert told in listed


def test_revoking_and_rotating(path: Path, command: Command) -> None:
    command("add alice --tokens-per-day 5")
    command("add bob")
    command("revoke bob")
    assert in_force(path).keys() == {"alice"}
    newer = command("rotate alice --grace 2h")[0]
    old, new = KeyFile(str(path)).read().for_ring()
    assert old.caller is new.caller, "else its limits would seem to be set anew by each request"
    assert new.digest == hashlib.sha256(newer.encode()).digest()
    assert old.caller == new.caller
    assert new.expires is None
    created = KeyFile(str(path)).read().keys["alice"].secrets[1].created.timestamp()
    assert old.expires - created == pytest.approx(7_200, abs=2)
    assert "2  " in command("list")[0]
    command("rotate alice --grace 0d")
    assert len(KeyFile(str(path)).read().for_ring()) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("add al/ice", "must be letters, digits"),
        ("add -- -alice", "must be letters, digits"),
        (f"add {'a' * 65}", "at most 64"),
        ("add new --requests-per-minute 0", "must be a whole number above 0"),
        ("add new --tokens-per-day lots", "must be a whole number above 0"),
        ("add new --expires soon", "must be a number with m, h, d or w"),
        ("add new --role king", "invalid choice"),
        ("add there", "There is a key named there already"),
        ("revoke nobody", "There is no key named nobody. There are: there."),
        ("rotate nobody", "There is no key named nobody."),
        ("", "required: COMMAND"),
        ("frobnicate", "invalid choice"),
    ],
)
def test_wrong_commands_change_nothing(path: Path, command: Command, line: str, said: str) -> None:
    command("add there")
    before = path.read_bytes()
    out, told = command(line, code=1)
    assert told.startswith("keys: ")
    assert said in told
    assert out == ""
    assert path.read_bytes() == before


GOOD = {"sha256": "0" * 64, "created": "2026-01-01T00:00:00Z"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not valid: Invalid JSON"),
        ("[]", "is not valid: Input should be an object"),
        ('{"version": 2}', "version: Input should be 1"),
        ({"a b": {"secrets": []}}, "String should match pattern"),
        ({"a": {}}, "keys.a.secrets: Field required"),
        ({"a": {"secrets": [GOOD | {"sha256": "00"}]}}, "sha256: String should match"),
        ({"a": {"secrets": [GOOD | {"expires": "2026-01-01"}]}}, "timezone"),
        ({"a": {"secrets": [GOOD], "requests_per_minute": 0}}, "greater than or equal to 1"),
        ({"a": {"secrets": [GOOD], "requests_per_minut": 1}}, "Extra inputs are not permitted"),
        ({"a": {"secrets": [GOOD], "role": "root"}}, "'user' or 'admin'"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(path: Path, content: object, said: str) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps({"keys": content}))
    with pytest.raises(KeyFileError) as error:
        KeyFile(str(path)).read()
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyFileError, match="No such file"):
        KeyFile(str(tmp_path / "keys.json")).read()
    assert keys.main(["--key-file", str(tmp_path / "no" / "keys.json"), "add", "a"]) == 1
    told = capsys.readouterr()
    assert told.out == ""  # a key that stands nowhere opens nothing: it is not shown
    assert f"There is no folder {tmp_path / 'no'}" in told.err


def test_many_commands_at_once_lose_no_key(path: Path) -> None:
    threads = [
        threading.Thread(target=keys.main, args=(["--key-file", str(path), "add", f"k{n}"],))
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert in_force(path).keys() == {f"k{n}" for n in range(20)}


def edited(path: Path) -> contextlib.AbstractContextManager[object]:
    return KeyFile(str(path)).edited()


def test_who_could_read_the_file_still_can(path: Path, command: Command) -> None:
    """It is often edited by root and read by a server that is not."""
    command("add alice")
    nobody = 65_534
    if os.geteuid() == 0:
        os.chown(path, nobody, nobody)
    path.chmod(0o640)
    before = path.stat()
    command("revoke alice")
    after = path.stat()
    assert after.st_ino != before.st_ino
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )


def test_a_link_stays_and_what_it_points_to_is_edited(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    target = folder / "real.json"
    path.symlink_to(target)
    for name in ("alice", "bob"):  # the first one makes the file
        assert keys.main(["--key-file", str(path), "add", name]) == 0
    assert path.is_symlink()
    assert in_force(target).keys() == {"alice", "bob"}
    assert {file.name for file in folder.iterdir()} == {"real.json", "real.json.lock"}
    target.unlink()
    folder.joinpath("real.json.lock").unlink()
    folder.rmdir()
    with pytest.raises(KeyFileError, match=f"There is no folder {folder}"), edited(path):
        pass
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(KeyFileError, match="Too many levels"), edited(path):
        pass


class Unopenable(type(Path())):
    """As in a server with too many connections; the real limit is the whole process's, in which
    other tests' threads open files."""

    def open(self, *_: object, **__: object) -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@contextlib.contextmanager
def no_file_can_be_opened(file: KeyFile) -> Iterator[None]:
    before, file.path = file.path, Unopenable(file.path)
    try:
        yield
    finally:
        file.path = before


def test_what_could_not_be_read_is_still_to_be_seen(path: Path, command: Command) -> None:
    command("add alice")
    file = KeyFile(str(path))
    file.read()
    assert not file.changed
    command("revoke alice")
    with no_file_can_be_opened(file), pytest.raises(KeyFileError, match="Too many open files"):
        file.read()
    assert file.changed
    assert file.read().keys == {}
    assert not file.changed


def test_a_change_that_keeps_size_and_time_is_one(path: Path, command: Command) -> None:
    command("add alice")
    file = KeyFile(str(path))
    file.read()
    seen = path.stat()
    path.write_text(path.read_text().replace("alice", "carol"))
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert file.changed


async def test_a_revocation_is_not_lost_to_a_moment_without_files(
    path: Path, command: Command
) -> None:
    command("add alice")
    file = KeyFile(str(path))
    file.read()
    command("revoke alice")
    seen: list[int] = []
    complaints: list[str] = []
    with no_file_can_be_opened(file):
        watching = asyncio.create_task(
            watch(
                file,
                lambda found: seen.append(len(found)),
                complaints.append,
                Nudge().within,
                interval_s=0.01,
            )
        )
        assert await asyncio.to_thread(eventually, lambda: complaints)
        assert not await asyncio.to_thread(eventually, lambda: len(complaints) > 1, 0.2)
    assert await asyncio.to_thread(eventually, lambda: seen == [0])
    watching.cancel()
    assert "Too many open files. The keys stay as they were." in complaints[0]


async def test_after_a_nudge_the_file_is_read_changed_or_not(path: Path, command: Command) -> None:
    command("add alice")
    file, nudge = KeyFile(str(path)), Nudge()
    file.read()
    seen: list[int] = []
    complaints: list[str] = []
    watching = asyncio.create_task(
        watch(
            file,
            lambda found: seen.append(len(found)),
            complaints.append,
            nudge.within,
            interval_s=600,
        )
    )

    async def nudged_until(told: list[object]) -> None:
        """Who is not waiting at the moment is not nudged."""
        count = len(told)
        while len(told) == count:
            nudge.give()
            await asyncio.sleep(0.01)

    await nudged_until(seen)
    assert seen[0] == 1
    await asyncio.to_thread(path.write_text, "{")
    for _ in range(2):  # whoever asks is told again
        await nudged_until(complaints)
    watching.cancel()


async def test_a_change_is_seen_and_a_broken_file_changes_nothing(
    path: Path, command: Command
) -> None:
    command("add alice")
    file = KeyFile(str(path))
    file.read()
    seen: list[set[str | None]] = []
    complaints: list[str] = []
    watching = asyncio.create_task(
        watch(
            file,
            lambda found: seen.append({key.caller.name for key in found}),
            complaints.append,
            Nudge().within,
            interval_s=0.01,
        )
    )

    def change() -> None:
        command("add bob")
        assert eventually(lambda: len(seen) == 1)
        good = path.read_text()
        path.write_text("{")
        assert eventually(lambda: len(complaints) == 1)
        path.unlink()
        assert not eventually(lambda: len(complaints) > 2, within_s=0.3)  # each is told once
        path.write_text(good)
        assert eventually(lambda: len(seen) == 2)

    await asyncio.to_thread(change)
    watching.cancel()
    assert seen == [{"alice", "bob"}] * 2
    assert len(complaints) == 2
    assert complaints[0].endswith("The keys stay as they were.")
