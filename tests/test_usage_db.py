"""``--usage-db``: where usage is kept, and what stops a start."""

import os
import sqlite3
import stat
from pathlib import Path

import pytest

from ochat_serve import cli
from ochat_serve.errors import StartupError
from ochat_serve.settings import Settings
from ochat_serve.usage.counters import ANONYMOUS, Row
from ochat_serve.usage_db import open_ledger
from tests.usage.accounts import DAY, EVER, of, request

KEYS = ("sk-a",)
SECRET = "my-secret"
ADDRESS = f"postgresql://me:{SECRET}@h/d"


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_with_keys_it_is_kept_where_an_applications_state_is(tmp_path: Path):
    ledger = open_ledger(Settings(api_keys=KEYS), {"XDG_STATE_HOME": str(tmp_path / "state")})
    assert ledger is not None
    ledger.add(request())
    ledger.close()
    assert files(tmp_path) == ["state/ochat_serve/usage.sqlite"]
    folder = tmp_path / "state" / "ochat_serve"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("told", [{}, {"XDG_STATE_HOME": ""}, {"XDG_STATE_HOME": "not/absolute"}])
def test_else_below_the_home_folder(
    tmp_path: Path, told: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    ledger = open_ledger(Settings(api_keys=KEYS), told)
    assert ledger is not None
    ledger.close()
    assert files(tmp_path) == [".local/state/ochat_serve/usage.sqlite"]


@pytest.mark.parametrize(
    "settings", [Settings(), Settings(api_keys=KEYS, usage_db="none"), Settings(usage_db="none")]
)
def test_off(tmp_path: Path, settings: Settings):
    assert open_ledger(settings, {"XDG_STATE_HOME": str(tmp_path)}) is None
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("keys", "rows"),
    [((), [Row(ANONYMOUS, DAY, of(1)), Row("a", DAY, of(1))]), (KEYS, [Row("a", DAY, of(1))])],
)
def test_a_file_of_its_own(tmp_path: Path, keys: tuple[str, ...], rows: list[Row]):
    """Also without keys; with keys, whoever came without one is nobody."""
    settings = Settings(usage_db=str(tmp_path / "usage"), api_keys=keys)
    ledger = open_ledger(settings)
    assert ledger is not None
    ledger.add(request("a"))
    ledger.add(request(None))
    assert ledger.read(*EVER) == rows
    ledger.close()


def test_a_name_means_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for count in (1, 2):
        ledger = open_ledger(Settings(usage_db=":memory:"))
        assert ledger is not None
        ledger.add(request())
        assert ledger.total("a", *EVER) == of(count)
        ledger.close()
    assert files(tmp_path) == [":memory:"]


def test_places_that_cannot_be(tmp_path: Path):
    (tmp_path / "text").write_text("This is a text, and no database at all. " * 100)
    (tmp_path / "other").touch()
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE ochat_usage (key TEXT)")
    other.close()
    for name, said in {
        "none/usage": "No such file or directory",
        ".": "Is a directory",
        "text": "file is not a database",
        "other": "no such column: requests",
    }.items():
        place = str(tmp_path / name)
        with pytest.raises(StartupError) as stopped:
            open_ledger(Settings(usage_db=place))
        assert str(stopped.value) == (
            f"--usage-db {place} cannot be used: {said}. "
            "Name another place, or keep no usage: --usage-db none."
        )


def test_no_folder_can_be_made(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match=r"There is no place for usage: .*--usage-db none\."):
        open_ledger(Settings(api_keys=KEYS), {"XDG_STATE_HOME": str(tmp_path / "file")})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "must be a file"),
        ("a\0b", "must be a file"),
        (f"mysql://me:{SECRET}@h/d", "must be a file"),
        (f"sqlite:///{SECRET}", "must be a file"),
        (f"postgresql://me:{SECRET}@x@h/d", "write @ as %40"),
        (f"postgresql://me:{SECRET}/@h/d", "write @ as %40"),
        (f"postgresql://me:{SECRET}?x@h/d", "write @ as %40"),
        (f"postgres://me:x@h/{SECRET}@d", "write @ as %40"),
        ("postgresql://", "write @ as %40"),
    ],
)
def test_what_is_no_place(value: str, said: str):
    with pytest.raises(StartupError, match=f"^--usage-db: {said}") as stopped:
        cli.parse(["--usage-db", value], {})
    error: BaseException | None = stopped.value
    while error is not None:
        assert SECRET not in f"{error} {error!r}"
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize(
    "value",
    ["usage", "/a/b c.sqlite", "none", "postgres://h", "postgresql:///d?host=/run/x", ADDRESS],
)
def test_what_is_one_and_is_not_shown(value: str):
    settings = cli.parse(["--usage-db", value], {}).settings
    assert settings.usage_db is not None
    assert settings.usage_db.get_secret_value() == value
    told = [repr(settings), str(settings), settings.model_dump_json(), str(settings.model_dump())]
    assert not [text for text in told if SECRET in text]


def test_no_test_writes_at_home(state_folder: Path):
    """Servers that tests start keep usage below a temporary folder."""
    assert os.environ["XDG_STATE_HOME"] == str(state_folder)
    ledger = open_ledger(Settings(api_keys=KEYS))
    assert ledger is not None
    ledger.close()
    assert "ochat_serve/usage.sqlite" in files(state_folder)
