"""From the command line, the environment and a YAML file to ``Settings`` and engine flags.

Our flags come from the fields of ``Settings``: name, default and help stand there.  Whatever
is not ours is vLLM's and passes through unchanged; vLLM checks it when it is loaded.  So this
module is quick, and the port can answer before vLLM is imported.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ochat_serve.errors import StartupError
from ochat_serve.settings import Settings

# As vLLM's own server spells it, and alike: a key must not end up in vLLM's complaint of unknown
# flags.
_OTHER_SPELLINGS = {"api_keys": ("--api-key",), "admin_keys": ("--admin-key",)}
PROG = "python -m ochat_serve.openai_api_server"
# Secrets: where else they are read from.  A command line can be seen by every user of a machine.
SECRETS = {"api_keys": "OCHAT_API_KEYS", "admin_keys": "OCHAT_ADMIN_KEYS"}
_EPILOG = """Every vLLM engine flag works too and is passed through unchanged
(--tensor-parallel-size N, --max-model-len N, --dtype ...): --help=all lists them."""
_OLD_SWITCHES = ("disable_log_requests", "engine_use_ray", "worker_use_ray")
KEY_FILE_VARIABLE = "OCHAT_KEY_FILE"
# Addresses, which may hold a password.
_ADDRESSES = {"usage_db": "OCHAT_USAGE_DB", "redis_url": "OCHAT_REDIS_URL"}
SECRET_VARIABLES = (*SECRETS.values(), *_ADDRESSES.values())
# What must not be shown, whatever is wrong with it.
_HIDDEN = (*SECRETS, *_ADDRESSES)
_CAN_BE_READ = "on the command line can be read by every user of this machine until"
_KEYS_TYPED = (
    f"keys {_CAN_BE_READ} they are hidden: OCHAT_API_KEYS or --key-file keep them to yourself."
)
_ADDRESSES_TYPED = (
    f"an address {_CAN_BE_READ} it is hidden, and a password in it, too: "
    f"{' and '.join(_ADDRESSES.values())} keep it to yourself."
)
# What a flag means that is given without its value, or as a switch in a file: YAML reads the
# words on and off as true and false.
_BARE = {"log_content": "full", "self_check": "on"}
_SWITCHED_OFF = {"log_content": "none", "self_check": "off"}
# A pattern that got lost would be a secret in the log.
_ADD_UP = ("log_redact",)
_JSON_LISTS = ("allowed_origins", "allowed_methods", "allowed_headers")


@dataclass(frozen=True, slots=True)
class Command:
    """What the user asked for.  ``notices`` are sentences to print before the start; ``title``
    is what the process should be called where its command line holds secrets."""

    settings: Settings
    engine_flags: tuple[str, ...] = ()
    revision: str | None = None
    notices: tuple[str, ...] = ()
    title: str | None = None
    help_all: bool = False


def say(text: str) -> None:
    """One line to the person at the terminal, whole: other processes write there, too."""
    sys.stderr.write(f"ochat_serve: {text}\n")
    sys.stderr.flush()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StartupError(f"{message[:1].upper()}{message[1:]}.")


def parser() -> argparse.ArgumentParser:
    """Our own flags.  ``-h`` prints them."""
    flags = _Parser(
        prog=PROG,
        description="Serve a chat model with OpenAI's API.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    for name, field in Settings.model_fields.items():
        flags.add_argument(*_spellings(name), **_argument(name, field))
    flags.add_argument(
        "--config", metavar="FILE", help="YAML file of flags; the command line wins."
    )
    flags.add_argument("--revision", metavar="REV", help="Revision of the model on the hub.")
    old = flags.add_argument_group("accepted from older command lines")
    old.add_argument("--disable-log-requests", action="store_true", help="vLLM logs no requests.")
    old.add_argument(
        "--engine-use-ray",
        action="store_true",
        help="No effect: the engine always runs in a process of its own.",
    )
    old.add_argument(
        "--worker-use-ray",
        action="store_true",
        help="Tensor-parallel workers run in Ray if it is installed, else in vLLM's own processes.",
    )
    return flags


def parse(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Command:
    """Raises ``StartupError`` with one sentence, or ``SystemExit`` after printing help."""
    flags = parser()
    arguments = [_with_dashes(argument) for argument in argv]
    if "--help=all" in arguments:
        flags.print_help()
        return Command(Settings(), help_all=True)
    known, engine_flags = flags.parse_known_args(arguments)
    if known.config is not None:
        known, engine_flags = flags.parse_known_args([*config_flags(known.config), *arguments])
    given = {name: value for name, value in vars(known).items() if value is not None}
    given = _from(environ) | {
        name: value for name, value in given.items() if value or name not in SECRETS
    }
    fields = {name: value for name, value in given.items() if name in Settings.model_fields}
    engine_flags, notices = _translate_old(known, engine_flags)
    title, warnings = _as_others_may_see(argv)
    return Command(
        settings=_settings(fields),
        engine_flags=tuple(engine_flags),
        revision=known.revision,
        notices=(*notices, *warnings),
        title=title if warnings else None,
    )


def _as_others_may_see(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The command line without its secrets, and what to tell the user of them."""
    names = {flag: name for name in _HIDDEN for flag in _spellings(name)}
    words, warnings = [PROG], []
    name = ""
    for word in argv:
        before, value = "", word
        if word.startswith("-"):
            flag, equals, value = word.partition("=")
            before, name = flag + equals, names.get(_with_dashes(flag), "")
        warning = _warning(name, value)
        words.append(before + ("***" if warning else value))
        warnings += [warning] if warning else []
    return " ".join(words), list(dict.fromkeys(warnings))


def _warning(name: str, value: str) -> str | None:
    """Of a secret in the value of a flag, if there may be one."""
    if name in SECRETS and value:
        return _KEYS_TYPED
    # Before the host, and in options behind it.
    if name in _ADDRESSES and re.search("[@?]", value):
        return _ADDRESSES_TYPED
    return None


def config_flags(path: str) -> list[str]:
    """The flags in a YAML file.  Raises ``StartupError``."""
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise StartupError(f"--config {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).replace("\n", " ")
        raise StartupError(f"--config {path} is not valid YAML: {reason}.") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise StartupError(f"--config {path} must be a mapping of flags to values.")
    flags: list[str] = []
    for name, value in (loaded or {}).items():
        flags += _config_flag(str(name).replace("_", "-"), value)
    return flags


def _config_flag(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if value is True:
        return [f"--{name}"]
    field = name.replace("-", "_")
    if value is False:
        if field in _SWITCHED_OFF:
            return [f"--{name}", _SWITCHED_OFF[field]]
        # Our own switches are off unless given; vLLM's have a form that turns them off.
        ours = (*Settings.model_fields, *_OLD_SWITCHES)
        return [] if field in ours else [f"--no-{name}"]
    if isinstance(value, dict) or field in _JSON_LISTS:
        return [f"--{name}", json.dumps(value)]
    if isinstance(value, list):
        if any(item is None or isinstance(item, list | dict) for item in value):
            # As a text it would be one that can be guessed: a key "None", say.
            raise StartupError(f"--{name} has an item in the file that is no plain value.")
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", str(value)]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _spellings(name: str) -> tuple[str, ...]:
    return (_flag(name), *_OTHER_SPELLINGS.get(name, ()))


def _argument(name: str, field: FieldInfo) -> dict[str, Any]:
    """How argparse should read one setting.  The default stays None: it stands in Settings."""
    text = (field.description or "").replace("%", "%%")
    if field.annotation is bool:
        return {"action": "store_const", "const": True, "help": text}
    if name in _JSON_LISTS:
        return {"type": _json_list, "metavar": "JSON", "help": text}
    if name in _ADD_UP:
        return {"nargs": "*", "action": "extend", "metavar": name.upper(), "help": text}
    if isinstance(field.default, tuple):
        return {"nargs": "*", "metavar": name.upper(), "help": text}
    shown = "" if field.default is None else f" (default: {field.default})"
    bare = {"nargs": "?", "const": _BARE[name]} if name in _BARE else {}
    return {"metavar": name.upper(), "help": text + shown, **bare}


def _json_list(text: str) -> list[str]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON list of strings")
    return value


def _with_dashes(argument: str) -> str:
    """``--max_model_len=4096`` -> ``--max-model-len=4096``, as vLLM accepts it."""
    match = re.match(r"--[A-Za-z0-9_-]+", argument)
    return match[0].replace("_", "-") + argument[match.end() :] if match else argument


def _from(environ: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: re.findall(r"[^\s,]+", environ.get(variable, ""))
        for name, variable in SECRETS.items()
    }
    for name, variable in {"key_file": KEY_FILE_VARIABLE, **_ADDRESSES}.items():
        found[name] = environ.get(variable)
    return {name: value for name, value in found.items() if value}


def _settings(fields: Mapping[str, Any]) -> Settings:
    try:
        return Settings.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = re.sub(r"^\w+ should ", "must ", first["msg"].removeprefix("Value error, "))
        if not first["loc"]:
            raise StartupError(f"{message}.") from error
        name = str(first["loc"][0])
        value = "" if name in _HIDDEN else f" {shlex.quote(str(first['input']))}"
        raise StartupError(f"{_flag(name)}{value}: {message}.") from error


def _translate_old(
    known: argparse.Namespace, engine_flags: list[str]
) -> tuple[list[str], list[str]]:
    """Flags that vLLM no longer has, in today's flags, and what to tell the user."""
    notices = []
    if known.disable_log_requests:
        engine_flags = [flag for flag in engine_flags if flag != "--enable-log-requests"]
    if known.engine_use_ray:
        notices.append("--engine-use-ray: the engine always runs in a process of its own now.")
    if known.worker_use_ray:
        if importlib.util.find_spec("ray") is None:
            notices.append("--worker-use-ray: Ray is not installed; vLLM runs its own processes.")
        else:
            engine_flags = ["--distributed-executor-backend", "ray", *engine_flags]
    if known.revision is not None:
        engine_flags = [*engine_flags, "--revision", known.revision]
    return engine_flags, notices
