"""The entry: ``python -m ochat_serve.keys``, which manages a key file.

A running server follows the file: what is changed here is in force within two seconds.
"""

import argparse
import os
import re
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NoReturn

from ochat_serve.caller import NAME_PATTERN, KeyLimits, digest_of
from ochat_serve.key_file import Content, Entry, KeyFile, KeyFileError, Secret

KEY_FILE_VARIABLE = "OCHAT_KEY_FILE"
DEFAULT_FILE = "keys.json"
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class CommandError(Exception):
    """What the user did wrong, in one sentence."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message[:1].upper()}{message[1:]}.")


@dataclass(frozen=True)
class Done:
    """What a command did.  A new key goes alone to stdout, so that a script can take it."""

    told: str
    key: str | None = None

    def show(self) -> None:
        if self.key is not None:
            print(self.key)
        print(self.told + " The key is shown only now." * bool(self.key), file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    flags = _Parser(prog="python -m ochat_serve.keys", description="Manage a server's API keys.")
    flags.add_argument(
        "--key-file",
        metavar="FILE",
        default=os.environ.get(KEY_FILE_VARIABLE, DEFAULT_FILE),
        help=f"the file (default: {KEY_FILE_VARIABLE} in the environment, else {DEFAULT_FILE})",
    )
    commands = flags.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = commands.add_parser("add", help="make a key and show it, once")
    add.add_argument("name", type=_name, help="whose key it is: stands in logs and usage")
    add.add_argument("--role", choices=("user", "admin"), default="user")
    add.add_argument("--expires", type=_moment, metavar="WHEN", help="30d, 12h or 2027-01-31")
    for limit in KeyLimits.__slots__:
        add.add_argument("--" + limit.replace("_", "-"), type=_positive, metavar="N")
    add.add_argument("--models", nargs="*", default=[], metavar="NAME", help="default: all")
    add.add_argument(
        "--log-content",
        choices=("none", "truncated", "full"),
        help="what the request log holds of this key's texts (default: the server's setting)",
    )
    commands.add_parser("list", help="show the names and what they may; no key")
    revoke = commands.add_parser("revoke", help="remove a name and all of its keys")
    revoke.add_argument("name")
    rotate = commands.add_parser("rotate", help="make another key for a name; the old one ends")
    rotate.add_argument("name")
    rotate.add_argument(
        "--grace",
        type=_duration,
        default=timedelta(days=1),
        metavar="TIME",
        help="how long the old key still works (default: 1d; 0d ends it now)",
    )
    return flags


def _name(text: str) -> str:
    if not re.fullmatch(NAME_PATTERN, text):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be letters, digits, dots, dashes and underscores, at most 64"
        )
    return text


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,5})([mhdw])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number with m, h, d or w: 30d")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return datetime.now(UTC) + _duration(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _new_secret() -> tuple[str, Secret]:
    key = f"sk-ochat-{secrets.token_urlsafe(32)}"
    now = datetime.now(UTC).replace(microsecond=0)
    return key, Secret(sha256=digest_of(key.encode()).hex(), created=now)


def add(content: Content, given: argparse.Namespace) -> Done:
    if given.name in content.keys:
        raise CommandError(f"There is a key named {given.name} already: rotate or revoke it.")
    key, secret = _new_secret()
    secret.expires = given.expires
    limits = {limit: getattr(given, limit) for limit in KeyLimits.__slots__}
    content.keys[given.name] = Entry(
        role=given.role,
        models=given.models,
        log_content=given.log_content,
        secrets=[secret],
        **limits,
    )
    return Done(f"{given.name} was added to {given.key_file}.", key)


def revoke(content: Content, given: argparse.Namespace) -> Done:
    _existing(content, given.name)
    del content.keys[given.name]
    return Done(f"{given.name} was removed from {given.key_file}.")


def rotate(content: Content, given: argparse.Namespace) -> Done:
    entry = _existing(content, given.name)
    key, secret = _new_secret()
    end = datetime.now(UTC).replace(microsecond=0) + given.grace
    still = [old for old in entry.secrets if old.expires is None or old.expires > secret.created]
    for old in still:
        old.expires = min(end, old.expires or end)
    entry.secrets = [*(still if given.grace else []), secret]
    return Done(f"{given.name} has another key; older ones end at {end:%Y-%m-%d %H:%M} UTC.", key)


def _existing(content: Content, name: str) -> Entry:
    if name not in content.keys:
        names = ", ".join(content.keys) or "none"
        raise CommandError(f"There is no key named {name}. There are: {names}.")
    return content.keys[name]


def show_list(content: Content) -> None:
    rows: list[tuple[str, ...]] = [("NAME", "ROLE", "KEYS", "EXPIRES", "LIMITS", "MODELS")]
    rows += [_row(name, entry) for name, entry in content.keys.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def _row(name: str, entry: Entry) -> tuple[str, ...]:
    now = datetime.now(UTC)
    ends = [secret.expires for secret in entry.secrets]
    last = None if None in ends else max(filter(None, ends), default=now)
    told = "never" if last is None else f"{last:%Y-%m-%d %H:%M}"
    limits = [
        f"{limit}={value}" for limit in KeyLimits.__slots__ if (value := getattr(entry, limit))
    ]
    alive = sum(end is None or end > now for end in ends)
    expired = " (expired)" if last is not None and last <= now else ""
    return (
        name,
        entry.role,
        str(alive),
        told + expired,
        ", ".join(limits) or "none",
        ", ".join(entry.models) or "all",
    )


_EDITS: dict[str, Callable[[Content, argparse.Namespace], Done]] = {
    "add": add,
    "revoke": revoke,
    "rotate": rotate,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 after one sentence."""
    try:
        given = parser().parse_args(argv)
        file = KeyFile(given.key_file)
        if given.command == "list":
            show_list(file.read())
            return 0
        with file.edited() as content:
            done = _EDITS[given.command](content, given)
        done.show()
        return 0
    except (CommandError, KeyFileError) as error:
        print(f"keys: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
