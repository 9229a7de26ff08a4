"""The server's own settings: one frozen object, whose fields are also the command line.

``cli`` makes a flag from every field: its name, default and help text stand here only.
vLLM's engine flags are not settings; they pass through to vLLM unchanged.
"""

import ipaddress
from typing import Annotated, Literal

import regex
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    model_validator,
)

AUTO: Literal["auto"] = "auto"
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


class Settings(BaseModel):
    """What the server was told at start.  A bad value raises pydantic's ``ValidationError``."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,  # a key must not stand in a traceback
        protected_namespaces=(),
    )

    # Model
    model: str = Field(
        "openchat/openchat-3.6-8b-20240522",
        min_length=1,
        description="Model to serve: a hub id, a folder, or 'demo' for the embedded small model.",
    )
    model_type: str | None = Field(
        None,
        description="Prompt template. Default: openchat.json in the model folder, else the "
        "model's name, else 'hf' (the model's own chat template).",
    )
    served_model_name: tuple[str, ...] = Field(
        (), description="Names that clients may use for the model, beside the usual ones."
    )
    enable_sys_prompt: bool = Field(
        False, description="Accepted for compatibility: system messages are always honoured."
    )
    default_temperature: float | None = Field(
        None,
        ge=0,
        le=2,
        description="Temperature of requests that name none. Default: 0.7 for OpenChat "
        "templates, 1 otherwise.",
    )

    # Requests
    stream_period: StreamPeriod = Field(
        AUTO,
        description="Tokens per stream event. 'auto': one, until so many streams are open that "
        "they are merged, each stream getting an event at least every 50 ms. The first token "
        "is sent at once.",
    )
    tokenizer_cache_mb: float = Field(
        64,
        ge=0,
        le=65536,
        description="Memory for the token ids of texts seen before, in MiB: a conversation that "
        "comes back costs only its new turn. 0 remembers nothing.",
    )
    max_n: int = Field(8, ge=1, le=1024, description="Largest 'n' (choices) a request may ask for.")
    max_body_mb: float = Field(4, gt=0, le=1024, description="Largest request body, in MiB.")
    ping_interval_s: float = Field(
        10, gt=0, description="Seconds of silence after which a stream gets a comment line."
    )
    strict_parameters: bool = Field(
        False,
        description="Refuse unknown request fields with 400 instead of naming them in "
        "the x-ochat-ignored response header.",
    )

    # Server
    host: str = Field("localhost", description="Host name or address to bind.")
    port: int = Field(18888, ge=0, le=65535, description="Port to bind; 0 takes a free one.")
    api_server_count: int = Field(
        1,
        ge=1,
        le=64,
        description="Front-end processes over the one engine. One carries tens of thousands of "
        "tokens per second; more are for many short requests.",
    )
    api_keys: tuple[SecretStr, ...] = Field(
        (),
        description="Keys that clients must send. Better given in the environment variable "
        "OCHAT_API_KEYS, separated by commas or spaces. None: no check.",
    )
    insecure_no_auth: bool = Field(
        False, description="Allow binding a public address without any API key."
    )
    allow_credentials: bool = Field(False, description="CORS: allow credentials.")
    allowed_origins: tuple[str, ...] = Field(
        (), description="CORS: JSON list of origins that may call from a browser. Default: none."
    )
    allowed_methods: tuple[str, ...] = Field(("*",), description="CORS: JSON list of methods.")
    allowed_headers: tuple[str, ...] = Field(("*",), description="CORS: JSON list of headers.")

    # Request log
    log_file: str | None = Field(None, description="File that gets one JSON line per request.")
    log_max_mb: int = Field(
        128, ge=1, description="Size of the log file before it is rotated, in MiB."
    )
    log_max_age_h: float = Field(
        168, gt=0, description="Age of the log file before it is rotated, in hours."
    )
    log_max_count: int = Field(10, ge=1, description="Rotated log files to keep.")
    log_total_mb: int = Field(
        1024, ge=1, description="Size of all rotated log files together, in MiB."
    )
    # ``caller.LogContent``, which keys may have, too.
    log_content: Literal["none", "truncated", "full"] = Field(
        "none",
        description="What the log keeps of requests and answers, beside their metadata. The "
        "flag alone means full. A key's own level wins.",
    )
    log_redact: tuple[Pattern, ...] = Field(
        (),
        description="Regular expressions: what they match in a logged text becomes [redacted]. "
        "Given several times, they add up.",
    )

    @model_validator(mode="after")
    def _check_together(self) -> "Settings":
        if not (self.api_keys or self.insecure_no_auth or is_loopback(self.host)):
            raise ValueError(
                f"--host {self.host} can be reached from other machines but no API key is set. "
                "Set OCHAT_API_KEYS, or pass --insecure-no-auth if that is what you want"
            )
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ValueError('--allow-credentials needs named --allowed-origins, not "*"')
        if self.log_total_mb < self.log_max_mb:
            raise ValueError(
                f"--log-total-mb {self.log_total_mb} is less than --log-max-mb {self.log_max_mb}: "
                "a rotated file might not fit"
            )
        return self

    @property
    def stream_interval(self) -> int:
        """Tokens per update of the engine's."""
        return 1 if self.stream_period == AUTO else self.stream_period

    @property
    def merges_streams(self) -> bool:
        """Whether tokens are merged as streams grow in number."""
        return self.stream_period == AUTO

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 2**20)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
