"""``GET /v1/usage``: who used how much, on which day."""

import asyncio
import csv
import io
import json
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.datastructures import QueryParams

from ochat_serve.caller import NAME_PATTERN, Caller
from ochat_serve.errors import InvalidRequest, NotFound, PermissionDenied, Unavailable
from ochat_serve.routes.replies import caller_of
from ochat_serve.usage.counters import ANONYMOUS, COUNTERS, Row, total
from ochat_serve.usage.database import DatabaseError
from ochat_serve.usage.ledger import UsageLedger
from ochat_serve.usage.reader import LedgerReader

logger = logging.getLogger(__name__)
DEFAULT_DAYS = 30
MAX_DAYS = 400
EVERY_KEY = "*"
_PARAMETERS = {
    "start": "First day, YYYY-MM-DD, UTC's; 29 days before the last if absent.",
    "end": "Last day; today if absent.",
    "key": "Admins only: the name of another key, or * for all.",
    "format": "json (if absent) or csv.",
}
_KEY = re.compile(f"{NAME_PATTERN}|{ANONYMOUS}")
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked for; both days are within.  ``key`` None is every key."""

    start: date
    end: date
    key: str | None
    format: str


def router(ledger: UsageLedger | None, now: Callable[[], float]) -> APIRouter:
    """``now`` gives Unix seconds."""
    routes = APIRouter()
    reader = None if ledger is None else LedgerReader(ledger)

    @routes.get("/v1/usage", openapi_extra={"parameters": _described()})
    async def usage(request: Request) -> Response:
        """Counters per key and day: the caller's own; for admins, any key's."""
        if reader is None:
            raise NotFound("No usage is kept by this server. Start it with --usage-db FILE.")
        today = datetime.fromtimestamp(now(), UTC).date()
        question = _question(request.query_params, caller_of(request), today)
        try:
            rows = await reader.read(str(question.start), str(question.end), question.key)
        except DatabaseError as error:
            logger.error("Usage cannot be read: %s", error)
            raise Unavailable(
                "Usage cannot be read at the moment. Please try again in a few seconds.",
                code="usage_unavailable",
                retry_after_s=5,
            ) from error
        body = await asyncio.to_thread(_FORMATS[question.format], rows, question)
        return Response(body, headers=_HEADERS[question.format])

    return routes


def _described() -> list[dict[str, Any]]:
    """The parameters in OpenAPI's words."""
    text = {"type": "string"}
    return [
        {"name": name, "in": "query", "required": False, "description": said, "schema": text}
        for name, said in _PARAMETERS.items()
    ]


def _question(query: QueryParams, caller: Caller, today: date) -> Question:
    """Raises ``InvalidRequest`` and ``PermissionDenied``."""
    unknown = next((name for name in query if name not in _PARAMETERS), None)
    if unknown is not None:
        raise InvalidRequest(
            f"There are only the parameters {', '.join(_PARAMETERS)}.", param=unknown[:64]
        )
    written = query.get("format", "json")
    if written not in _FORMATS:
        raise InvalidRequest("'format' must be json or csv.", param="format")
    start, end = _days(query, today)
    return Question(start, end, _key(query, caller), written)


def _key(query: QueryParams, caller: Caller) -> str | None:
    own = caller.name or ANONYMOUS
    key = query.get("key", own)
    if key != own and not caller.is_admin:
        raise PermissionDenied("Only admins may see the usage of other keys.", param="key")
    if key == EVERY_KEY:
        return None
    if _KEY.fullmatch(key) is None:
        raise InvalidRequest("'key' must be the name of a key, or * for all.", param="key")
    return key


def _days(query: QueryParams, today: date) -> tuple[date, date]:
    end = _day(query, "end") or today
    start = _day(query, "start") or _back(end, DEFAULT_DAYS - 1)
    if start > end:
        raise InvalidRequest("'start' must not be after 'end'.", param="start")
    if (end - start).days >= MAX_DAYS:
        raise InvalidRequest(f"At most {MAX_DAYS} days can be asked for.", param="start")
    return start, end


def _day(query: QueryParams, name: str) -> date | None:
    text = query.get(name)
    if text is None:
        return None
    try:
        if _DAY.fullmatch(text):
            return date.fromisoformat(text)
    except ValueError:
        pass  # the 30th of February
    raise InvalidRequest(f"'{name}' must be a day, YYYY-MM-DD.", param=name)


def _back(day: date, days: int) -> date:
    return day - min(timedelta(days), day - date.min)


def _json(rows: list[Row], question: Question) -> str:
    body = {
        "object": "list",
        "start": str(question.start),
        "end": str(question.end),
        "data": [{"object": "usage", **_fields(row)} for row in rows],
        "total": asdict(total(rows)),
    }
    return json.dumps(body, separators=(",", ":"))


def _fields(row: Row) -> dict[str, Any]:
    return {"key": row.key, "day": row.day, **asdict(row.counters)}


def _csv(rows: Iterable[Row], question: Question) -> str:
    """As RFC 4180 has it.  No cell can be taken for a formula: names, days and numbers begin with
    a letter, a digit or an underscore."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("key", "day", *COUNTERS))
    writer.writerows((row.key, row.day, *row.counters.values()) for row in rows)
    return text.getvalue()


_FORMATS: dict[str, Callable[[list[Row], Question], str]] = {"json": _json, "csv": _csv}
_HEADERS = {
    "json": {"content-type": "application/json"},
    "csv": {
        "content-type": "text/csv; charset=utf-8; header=present",
        "content-disposition": 'attachment; filename="usage.csv"',
    },
}
