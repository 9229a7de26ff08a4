"""``--key-file``: which files this server can honour."""

from pathlib import Path

import pytest

from ochat_serve import keys
from ochat_serve.errors import StartupError
from ochat_serve.key_file import KeyFileError
from ochat_serve.named_keys import open_key_file
from ochat_serve.settings import Settings

FIXED = [{"api_keys": ("sk-a",)}, {"admin_keys": ("sk-a",)}]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "keys.json")


def add(path: str, name: str) -> None:
    assert keys.main(["--key-file", path, "add", name]) == 0


@pytest.mark.parametrize("fixed", FIXED)
@pytest.mark.parametrize("name", ["key-1", "admin-1", "key-20"])
def test_a_name_of_a_key_without_a_name_is_taken(
    path: str, fixed: dict[str, tuple[str, ...]], name: str
) -> None:
    add(path, "alice")
    add(path, name)
    with pytest.raises(StartupError, match=f"has a key named {name}, which is a name of a key in"):
        open_key_file(Settings(key_file=path, **fixed))
    assert open_key_file(Settings(key_file=path)) is not None, "nobody else has it"


@pytest.mark.parametrize("name", ["key-one", "key-1x", "my-key-1", "key1", "admin"])
def test_names_that_are_like_it_are_not(path: str, name: str) -> None:
    add(path, name)
    assert open_key_file(Settings(key_file=path, **FIXED[0])) is not None


def test_nor_may_the_name_be_given_later(path: str) -> None:
    """A server that runs keeps its keys, and says why."""
    add(path, "alice")
    file = open_key_file(Settings(key_file=path, **FIXED[0]))
    assert file is not None
    add(path, "key-1")
    with pytest.raises(KeyFileError, match="named key-1"):
        file.read()


def test_without_a_file_there_is_none() -> None:
    assert open_key_file(Settings(**FIXED[0])) is None
