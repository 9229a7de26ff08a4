"""What is told about a request beside its answer: response headers, and the log's parameters."""

import re
from dataclasses import asdict

from ochat_serve.chat_request import ReplyForm
from ochat_serve.generation import SamplingOptions
from ochat_serve.protocol.chat import ChatCompletionRequest

IGNORED_HEADER = "x-ochat-ignored"
MAX_TOKENS_HEADER = "x-ochat-max-tokens"

_DEFAULTS = asdict(SamplingOptions(max_tokens=0))
del _DEFAULTS["stream_interval"]  # the server's choice, not the client's
_TOLD_BY_NUMBER = frozenset({"stop", "logit_bias", "stop_token_ids"})


def notes(
    ignored: list[str], request: ChatCompletionRequest, options: SamplingOptions
) -> dict[str, str]:
    """Response headers that say what was not done as asked."""
    notes = ignored_header(ignored)
    asked = request.max_completion_tokens or request.max_tokens
    if asked is not None and asked > options.max_tokens:
        notes[MAX_TOKENS_HEADER] = str(options.max_tokens)
    return notes


def ignored_header(ignored: list[str]) -> dict[str, str]:
    return {IGNORED_HEADER: printable(ignored)} if ignored else {}


def printable(names: list[str]) -> str:
    """A field name can be anything; a header value cannot, and neither begin nor end in spaces."""
    return ", ".join(re.sub(r"[^!-~]", "?", name[:64]) or "?" for name in names)


def logged(options: SamplingOptions, form: ReplyForm) -> dict[str, object]:
    """The parameters in the log: those that differ from the defaults.  Stop strings and biases
    may hold what a user said: only their number is told."""
    logged: dict[str, object] = {
        name: len(value) if name in _TOLD_BY_NUMBER else value
        for name, default in _DEFAULTS.items()
        if (value := getattr(options, name)) != default
    }
    if options.constraint is not None:
        logged["constraint"] = options.constraint.kind
    return logged | ({"stream": True} if form.stream else {})
