"""From what the user calls a model to where it lies and how it is served.

Runs before vLLM is imported: a missing model is said within seconds.
"""

import json
import os
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from ochat_serve import demo_model
from ochat_serve.errors import StartupError
from ochat_serve.setting_values import DEMO
from ochat_serve.templates.registry import MODEL_TYPES, TEMPLATES, canonical, model_type_of_name

_REACH_TIMEOUT_S = 3


class _Absent(StartupError):
    """The model has no such file."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that exists.  ``path`` is a folder or a hub id; ``names[0]`` is the default name."""

    path: str
    model_type: str
    names: tuple[str, ...]

    @property
    def owned_by(self) -> str:
        template = TEMPLATES.get(self.model_type)
        return template.owned_by if template else "ochat_serve"

    @property
    def context(self) -> int | None:
        """The most tokens that the template allows, None for the model's own bound."""
        template = TEMPLATES.get(self.model_type)
        return template.max_model_len if template and template.is_openchat else None


def locate(
    model: str,
    *,
    model_type: str | None = None,
    served_model_name: tuple[str, ...] = (),
    revision: str | None = None,
) -> ModelSource:
    """Find a model: ``demo``, a folder, or a hub id.  Raises ``StartupError``."""
    if model_type is not None and model_type not in MODEL_TYPES:
        raise StartupError(
            f"--model-type {model_type} is unknown. Choose one of: {', '.join(MODEL_TYPES)}."
        )
    if model == DEMO:
        path, own_names = str(demo_model.ensure()), list(demo_model.NAMES)
    else:
        _config(model, "config.json", revision)
        folder = _expanded(model)
        path = os.path.abspath(folder) if folder.is_dir() else model
        own_names = [model, Path(path).name]
    kind = canonical(model_type) if model_type else _detect(path, revision)
    template = TEMPLATES.get(kind)
    type_names = (template.name, *template.aliases) if template and template.is_openchat else ()
    names = tuple(dict.fromkeys((*served_model_name, *type_names, *own_names)))
    return ModelSource(path=path, model_type=kind, names=names)


def _detect(model: str, revision: str | None) -> str:
    """The model type: openchat.json in the model folder, else the name, else ``hf``."""
    try:
        told = _config(model, "openchat.json", revision)
    except _Absent:
        return model_type_of_name(Path(model).name)
    kind = told.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise StartupError(
            f"openchat.json of {model} names the model type {kind!r}, which is unknown here. "
            f"Choose one with --model-type: {', '.join(MODEL_TYPES)}."
        )
    return canonical(kind)


def _config(model: str, name: str, revision: str | None) -> dict[str, Any]:
    """A JSON file of the model, from its folder or the hub.  Raises ``StartupError``."""
    folder = _expanded(model)
    looks_like_path = model.startswith(("/", ".", "~")) or model.count("/") > 1
    try:
        if folder.is_dir():
            file = folder / name
        elif looks_like_path:
            raise StartupError(f"There is no model folder {model}.")
        else:
            local_only = not _hub_is_reachable()
            file = Path(
                hf_hub_download(model, name, revision=revision, local_files_only=local_only)
            )
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _Absent(_missing(model, name, in_folder=folder.is_dir())) from error
    except (EntryNotFoundError, HFValidationError) as error:
        raise _Absent(_missing(model, name, in_folder=False)) from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise StartupError(f"The model {model} cannot be fetched: {reason}") from error
    except ValueError as error:
        raise StartupError(f"{name} of {model} is not valid JSON: {error}.") from error
    if not isinstance(loaded, dict):
        raise StartupError(f"{name} of {model} is not a JSON object.")
    return loaded


def _expanded(model: str) -> Path:
    try:
        return Path(model).expanduser()
    except RuntimeError as error:
        raise StartupError(f"There is no model folder {model}: {error}") from error


@cache
def _hub_is_reachable() -> bool:
    """A quick look before the hub's client spends half a minute on retries."""
    url = urllib.parse.urlparse(ENDPOINT)
    if urllib.request.getproxies().keys() & {url.scheme, "all"}:
        return True  # only the proxy can tell
    try:
        port = url.port or (80 if url.scheme == "http" else 443)
        socket.create_connection((url.hostname or "", port), timeout=_REACH_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _missing(model: str, name: str, *, in_folder: bool) -> str:
    if in_folder:
        return f"The folder {model} is not a model: it has no {name}."
    return (
        f"The model {model} was not found: it is no folder here, and the hub did not give its "
        f"{name}. Check the name and the network, or try --model demo."
    )
