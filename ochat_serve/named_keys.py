"""``--key-file``: from the settings to a file of named keys that this server can honour."""

import re
from collections.abc import Callable

from ochat_serve.errors import StartupError
from ochat_serve.key_file import Content, KeyFile, KeyFileError
from ochat_serve.settings import Settings

# As ``app`` names the keys that have none.
_FIXED_NAME = re.compile(r"(key|admin)-\d+")


def open_key_file(settings: Settings) -> KeyFile | None:
    """The key file, after one reading.  Raises ``StartupError``."""
    if settings.key_file is None:
        return None
    file = KeyFile(settings.key_file, _can_be_honoured(settings))
    try:
        file.read()
    except KeyFileError as error:
        raise StartupError(str(error)) from error
    return file


def _can_be_honoured(settings: Settings) -> Callable[[Content], None]:
    def check(content: Content) -> None:
        if settings.api_keys or settings.admin_keys:
            _check_names(content)
        if settings.api_server_count > 1 and settings.redis_url is None:
            _check_limits(content, settings.api_server_count)

    return check


def _check_names(content: Content) -> None:
    """One name is one account and one cache: two keys must not have it."""
    for name in filter(_FIXED_NAME.fullmatch, content.keys):
        raise KeyFileError(
            f"The key file has a key named {name}, which is a name of a key in OCHAT_API_KEYS or "
            "OCHAT_ADMIN_KEYS: give it another, or give all keys in the file."
        )


def _check_limits(content: Content, front_ends: int) -> None:
    for name, entry in content.keys.items():
        if entry.caller(name).is_limited:
            raise KeyFileError(
                f"The key {name} has limits, which {front_ends} front ends can keep together in "
                "Redis only: give --redis-url, or --api-server-count 1."
            )
