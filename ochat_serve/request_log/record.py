"""What is known of one request, the words for what became of it, and the line it becomes."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from ochat_serve.caller import Caller, LogContent
from ochat_serve.generation import Usage

Outcome = Literal["finished", "rejected", "failed", "timeout", "abandoned", "shutdown"]
# A text of a line -> what is logged of it
Edit = Callable[[str], str]

# What a text of a request or an answer keeps at the level "truncated".
KEPT_CHARS = 256
# Of a record's own fields, about.
_RECORD_CHARS = 2**11

# Where the status does not tell, or tells another thing, the error code does.
OUTCOMES_BY_ERROR: dict[str, Outcome] = {
    "engine_dead": "failed",
    "engine_failed": "failed",
    "deadline_exceeded": "timeout",
    "queue_timeout": "timeout",
    "shutting_down": "shutdown",
}
OUTCOMES_BY_STATUS: dict[int, Outcome] = {408: "timeout", 503: "rejected", 504: "timeout"}


def outcome_of(status: int | None, error: str | None) -> Outcome:
    """What became of a request that was answered with this status and error code."""
    if error in OUTCOMES_BY_ERROR:
        return OUTCOMES_BY_ERROR[error]
    if status in OUTCOMES_BY_STATUS:
        return OUTCOMES_BY_STATUS[status]
    if status is None or status >= 500:
        return "failed"
    if status >= 400:
        return "rejected"
    return "finished" if error is None else "failed"


@dataclass(slots=True)
class RequestRecord:
    """What is known of one request, filled in along its road.  Times are in seconds; ``time``
    is Unix time, ``total_s`` counts from the request's arrival, ``first_token_s`` from when its
    body was read, ``queue_s`` until the engine got it.

    ``content`` is how much of what is said may be kept, None where no log is kept; ``request``
    is the body as JSON, ``outputs`` one text per choice: both None where nothing is kept.
    """

    time: float
    request_id: str
    method: str
    path: str
    content: LogContent | None = None
    client: str | None = None
    key: str | None = None
    id: str | None = None
    model: str | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    usage: Usage | None = None
    finish_reasons: list[str | None] = field(default_factory=list)
    queue_s: float | None = None
    first_token_s: float | None = None
    total_s: float | None = None
    status: int | None = None
    outcome: Outcome | None = None
    error: str | None = None
    # More for the response's head: what is left of the caller's limits.
    headers: dict[str, str] = field(default_factory=dict)
    request: str | None = None
    outputs: list[str] | None = None

    def sent_by(self, caller: Caller) -> None:
        """Note whose request it is, and what of it they let be logged."""
        self.key = caller.name
        if self.content is not None:
            self.content = caller.log_content or self.content

    @property
    def keeps_content(self) -> bool:
        return self.content is not None and self.content != "none"

    @property
    def weight(self) -> int:
        """About the characters that it holds in memory."""
        said = len(self.request or "") + sum(map(len, self.outputs or ()))
        return _RECORD_CHARS + said + sum(map(len, (self.metadata or {}).values()))

    def line(self, redact: Edit | None = None) -> str:
        """One line of JSON; what is not known is left out.

        Cut after redaction: half of a match at the cut would be no match.
        """
        shown = redact or _unchanged
        said = _redacted_and_cut(shown) if self.content == "truncated" else shown
        fields = {
            "time": round(self.time, 3),
            "request_id": self.request_id,
            "id": self.id,
            "method": self.method,
            "path": shown(self.path),
            "client": self.client,
            "key": self.key,
            "model": self.model,
            "user": _edited(self.user, shown),
            "metadata": _edited(self.metadata, shown),
            "parameters": self.parameters or None,
            "prompt_tokens": self.usage.prompt_tokens if self.usage else None,
            "completion_tokens": self.usage.completion_tokens if self.usage else None,
            "cached_tokens": self.usage.cached_tokens if self.usage else None,
            "finish_reasons": self.finish_reasons or None,
            "queue_s": _milliseconds(self.queue_s),
            "first_token_s": _milliseconds(self.first_token_s),
            "total_s": _milliseconds(self.total_s),
            "status": self.status,
            "outcome": self.outcome,
            "error": self.error,
            "request": _edited(json.loads(self.request), said) if self.request else None,
            "outputs": _edited(self.outputs, said),
        }
        known = {name: value for name, value in fields.items() if value is not None}
        return json.dumps(known, ensure_ascii=False, separators=(",", ":"))


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _unchanged(text: str) -> str:
    return text


def cut(text: str) -> str:
    """The beginning of a text, and how much was cut."""
    more = len(text) - KEPT_CHARS
    return f"{text[:KEPT_CHARS]}… [{more} more characters]" if more > 0 else text


def _redacted_and_cut(redact: Edit) -> Edit:
    return lambda text: cut(redact(text))


def _edited(value: Any, edit: Edit) -> Any:
    """Every text in a JSON value edited: the names of fields too, a client may choose them."""
    if edit is _unchanged:
        return value
    if isinstance(value, str):
        return edit(value)
    if isinstance(value, list):
        return [_edited(item, edit) for item in value]
    if isinstance(value, dict):
        return {edit(name): _edited(item, edit) for name, item in value.items()}
    return value
