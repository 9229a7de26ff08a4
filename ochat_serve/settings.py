"""The server's own settings: one frozen object, whose fields are also the command line.

``cli`` makes a flag from every field: its name, default and help text stand here only.
vLLM's engine flags are not settings; they pass through to vLLM unchanged.
"""

import ipaddress
from functools import lru_cache
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from ochat_serve.setting_values import (
    AUTO,
    Networks,
    Pattern,
    RedisUrl,
    SelfCheck,
    StreamPeriod,
    SubPath,
    UsagePlace,
)


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
    max_inflight: int | None = Field(
        None,
        ge=1,
        description="Choices in the engine at a time; more requests wait in the queue. Default: "
        "vLLM's --max-num-seqs.",
    )
    max_queue: int = Field(
        1024, ge=0, description="Requests that may wait for the engine; more get 503."
    )
    max_queue_tokens: int = Field(
        2_000_000, ge=1, description="Tokens of the prompts that may wait; more get 503."
    )
    queue_timeout_s: float = Field(
        60, gt=0, description="Seconds after which a request that still waits gets 503."
    )
    request_timeout_s: float = Field(
        600,
        gt=0,
        description="Seconds for a whole request; then 504, or an error event in a stream. The "
        "request header x-ochat-timeout-s asks for less.",
    )
    max_n: int = Field(8, ge=1, le=1024, description="Largest 'n' (choices) a request may ask for.")
    max_body_mb: float = Field(4, gt=0, le=1024, description="Largest request body, in MiB.")
    ping_interval_s: float = Field(
        10, gt=0, description="Seconds of silence after which a stream gets a comment line."
    )
    read_timeout_s: float = Field(
        60,
        gt=0,
        le=3600,
        description="Seconds in which a request must have come whole; its headers in 10 of them. "
        "Who sends more slowly gets 408.",
    )
    write_timeout_s: float = Field(
        60,
        gt=0,
        le=3600,
        description="Seconds after which a client is dropped that has read nothing of an answer "
        "that waits for it, or less than 1 KiB a second.",
    )
    strict_parameters: bool = Field(
        False,
        description="Refuse unknown request fields with 400 instead of naming them in "
        "the x-ochat-ignored response header.",
    )

    # Health
    stall_s: float = Field(
        60,
        gt=0,
        description="Seconds without any sign of life of the engine after which the server is "
        "not ready. Longer than the longest step of the engine.",
    )
    drain_s: float = Field(
        30,
        ge=0,
        description="Seconds that open requests have to finish after a signal to stop, while new "
        "ones get a 503. A second signal ends the server at once.",
    )

    self_check: SelfCheck = Field(
        "auto",
        description="At start, ask the model for the capital of France, and do not serve one that "
        "does not know it. 'auto': the demo model and OpenChat's own, whose answer is known; the "
        "flag alone means on: any model.",
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
    ssl_certfile: str | None = Field(
        None,
        min_length=1,
        description="HTTPS: file with the certificate and its chain, in PEM format. Loaded again "
        "when it changes.",
    )
    ssl_keyfile: str | None = Field(
        None, min_length=1, description="HTTPS: file with its private key, without a passphrase."
    )
    forwarded_allow_ips: Networks = Field(
        (ipaddress.ip_network("127.0.0.1"), ipaddress.ip_network("::1")),
        description="Addresses and networks of the gateways in front, whose word is taken for "
        "who sends a request: X-Forwarded-For and X-Forwarded-Proto. Default: this machine "
        "(127.0.0.1 ::1). Without a value: nobody's.",
    )
    root_path: SubPath = Field(
        "", description="Path under which a gateway offers the server, such as /llm."
    )
    max_connections: int = Field(
        4096,
        ge=1,
        le=65536,
        description="Connections that one front end holds open; more get 503.",
    )
    api_keys: tuple[SecretStr, ...] = Field(
        (),
        description="Keys that clients must send. Better given in the environment variable "
        "OCHAT_API_KEYS, separated by commas or spaces. None: no check.",
    )
    admin_keys: tuple[SecretStr, ...] = Field(
        (),
        description="Keys that may also read metrics and everybody's usage. Better given in the "
        "environment variable OCHAT_ADMIN_KEYS.",
    )
    key_file: str | None = Field(
        None,
        min_length=1,
        description="File of named keys with roles and limits, made by python -m ochat_serve.keys. "
        "It is followed: changes are in force within two seconds.",
    )
    redis_url: RedisUrl | None = Field(
        None,
        description="Redis in which the limits of keys are kept, for several front ends or "
        "machines together: redis://, rediss:// (TLS) or unix://. Better given in the environment "
        "variable OCHAT_REDIS_URL, if it holds a password. Default: in this process.",
    )
    insecure_no_auth: bool = Field(
        False, description="Allow binding a public address without any API key."
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="Host names, beside this machine's own, that requests may be addressed to "
        "while --host is a loopback address (a gateway may pass on its own). '*' allows all.",
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

    # Usage
    usage_db: UsagePlace | None = Field(
        None,
        description="Where usage per key and day is kept: a file, a postgresql:// address, or "
        "'none'. Default: with keys, ~/.local/state/ochat_serve/usage.sqlite (or below "
        "XDG_STATE_HOME); without keys, none.",
    )

    @model_validator(mode="after")
    def _check_together(self) -> "Settings":
        if not (self.has_keys or self.insecure_no_auth or is_loopback(self.host)):
            raise ValueError(
                f"--host {self.host} can be reached from other machines but no API key is set. "
                "Set OCHAT_API_KEYS or --key-file, or pass --insecure-no-auth if that is what "
                "you want"
            )
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("--ssl-certfile and --ssl-keyfile are needed together")
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ValueError('--allow-credentials needs named --allowed-origins, not "*"')
        if self.max_inflight is not None and self.max_inflight < self.api_server_count:
            raise ValueError(
                f"--max-inflight {self.max_inflight} is less than --api-server-count "
                f"{self.api_server_count}: each front end needs a place in the engine"
            )
        if self.log_total_mb < self.log_max_mb:
            raise ValueError(
                f"--log-total-mb {self.log_total_mb} is less than --log-max-mb {self.log_max_mb}: "
                "a rotated file might not fit"
            )
        return self

    @property
    def has_keys(self) -> bool:
        """Whether requests need a key."""
        return bool(self.api_keys or self.admin_keys or self.key_file)

    @property
    def scheme(self) -> Literal["http", "https"]:
        return "http" if self.ssl_certfile is None else "https"

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


@lru_cache(1024)  # asked of every request
def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
