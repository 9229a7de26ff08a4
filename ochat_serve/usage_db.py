"""``--usage-db``: from the settings and the environment to an open ledger."""

import os
from collections.abc import Mapping
from pathlib import Path

from ochat_serve.errors import StartupError, Unavailable
from ochat_serve.limits import UsedBefore
from ochat_serve.setting_values import NONE, POSTGRES_SCHEMES
from ochat_serve.settings import Settings
from ochat_serve.usage.database import DatabaseError, postgres_database, sqlite_database
from ochat_serve.usage.ledger import UsageLedger
from ochat_serve.usage.reader import LedgerReader

_DEFAULT_FILE = Path("ochat_serve", "usage.sqlite")
_FOLDER_MODE = 0o700
_RETRY_S = 5
_WAY_OUT = "Name another place, or keep no usage: --usage-db none."


def open_ledger(settings: Settings, environ: Mapping[str, str] = os.environ) -> UsageLedger | None:
    """None where usage is not kept.  Raises ``StartupError`` with one sentence."""
    place = _place(settings, environ)
    if place is None:
        return None
    is_address = place.startswith(POSTGRES_SCHEMES)
    shown = "" if is_address else f" {place}"  # an address may hold a password
    try:
        database = postgres_database(place) if is_address else sqlite_database(place)
        database.check()
    except DatabaseError as error:
        reason = str(error).rstrip(".")
        raise StartupError(f"--usage-db{shown} cannot be used: {reason}. {_WAY_OUT}") from error
    except ImportError as error:
        raise StartupError(
            "--usage-db with PostgreSQL needs the package psycopg: pip install 'psycopg[binary]'."
        ) from error
    return UsageLedger(database, anonymous=not settings.has_keys)


def used_before(ledger: LedgerReader) -> UsedBefore:
    """For ``limits``: quotas go on where the ledger stands."""

    async def used(key: str, period: str) -> int:
        days = (f"{period}-01", f"{period}-31") if len(period) == len("2026-01") else (period,) * 2
        try:
            account = await ledger.total(key, *days)
        except DatabaseError as error:
            raise Unavailable(
                "The usage of this key cannot be read at the moment.",
                code="usage_unavailable",
                retry_after_s=_RETRY_S,
            ) from error
        return account.prompt_tokens + account.completion_tokens

    return used


def _place(settings: Settings, environ: Mapping[str, str]) -> str | None:
    if settings.usage_db is not None:
        told = settings.usage_db.get_secret_value()
        return None if told == NONE else told
    return str(_default_file(environ)) if settings.has_keys else None


def _default_file(environ: Mapping[str, str]) -> Path:
    """In the folder that XDG's specification has for an application's state."""
    try:
        told = Path(environ.get("XDG_STATE_HOME", ""))
        state = told if told.is_absolute() else Path("~/.local/state").expanduser()
        file = state / _DEFAULT_FILE
        file.parent.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise StartupError(f"There is no place for usage: {error}. {_WAY_OUT}") from error
    return file
