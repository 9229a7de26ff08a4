"""What values of settings look like: each kind with its check."""

import ipaddress
import re
from typing import Annotated, Literal

import regex
from pydantic import AfterValidator, BeforeValidator, SecretStr

AUTO: Literal["auto"] = "auto"
NONE: Literal["none"] = "none"
DEMO = "demo"
SelfCheck = Literal["auto", "on", "off"]
POSTGRES_SCHEMES = ("postgresql://", "postgres://")
REDIS_SCHEMES = ("redis://", "rediss://", "unix://")
MAX_STREAM_PERIOD = 1000


def _stream_period(value: object) -> object:
    text = str(value).strip()
    if text == AUTO or (text.isascii() and text.isdigit() and 0 < int(text) <= MAX_STREAM_PERIOD):
        return text if text == AUTO else int(text)
    raise ValueError(f"must be '{AUTO}' or a number of tokens from 1 to {MAX_STREAM_PERIOD}")


def _pattern(value: str) -> str:
    try:
        matches_nothing = regex.compile(value).search("") is not None
    except regex.error as error:
        raise ValueError(f"is not a regular expression: {error}") from error
    if matches_nothing:
        raise ValueError("must not match the empty text: it would match everywhere")
    return value


Pattern = Annotated[str, AfterValidator(_pattern)]
StreamPeriod = Annotated[int | Literal["auto"], BeforeValidator(_stream_period)]


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _items(value: object) -> object:
    """Commas part items, too, as in uvicorn's flag of that name."""
    if not isinstance(value, list | tuple):
        return value
    return tuple(text for item in value for text in re.split(r"[\s,]+", str(item)) if text)


def _network(value: object) -> Network:
    try:
        return ipaddress.ip_network(str(value))
    except ValueError as error:
        raise ValueError(f"must be an address or a network: {error}") from error


Networks = Annotated[
    tuple[Annotated[Network, BeforeValidator(_network)], ...], BeforeValidator(_items)
]


def _sub_path(value: str) -> str:
    if re.fullmatch(r"(/[A-Za-z0-9._~-]+)*/?", value):
        return value.removesuffix("/")
    raise ValueError("must be a path such as /llm")


SubPath = Annotated[str, AfterValidator(_sub_path)]


def _check_credentials(address: str) -> None:
    """Elsewhere an @ or a / of a password's makes a client take the rest of it for a host or a
    port, and those stand in errors."""
    if re.fullmatch(r"\w+://([^@/?]*@)?[^@]+", address) is None:
        raise ValueError("write @ as %40, / as %2F and ? as %3F in a name or a password")


def _usage_place(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if text.startswith(POSTGRES_SCHEMES):
        _check_credentials(text)
    elif not text or "://" in text or "\0" in text:
        raise ValueError("must be a file, a postgresql:// address or 'none'")
    return value


UsagePlace = Annotated[SecretStr, AfterValidator(_usage_place)]


def _redis_url(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if not text.startswith(REDIS_SCHEMES):
        raise ValueError(f"must begin with one of {', '.join(REDIS_SCHEMES)}")
    _check_credentials(text)
    return value


RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]
