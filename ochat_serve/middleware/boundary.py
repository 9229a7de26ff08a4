"""The outermost layer: every request enters and leaves here.

It gives the request its id, turns what nobody expected into an error body, and hands one
record per API request to the log and the ledger, whatever became of the request.
"""

import asyncio
import itertools
import logging
import re
from collections.abc import Callable, Sequence
from secrets import token_hex

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ochat_serve.caller import LogContent
from ochat_serve.errors import ServerFault
from ochat_serve.request_log import RequestRecord, outcome_of
from ochat_serve.routes.connection import Connection, connection_of
from ochat_serve.routes.replies import error_response, header
from ochat_serve.streaming import error_event

logger = logging.getLogger(__name__)
# Ids must differ, and need not be hard to guess: randomness is asked for once a process.
_PROCESS = token_hex(8)
_numbers = itertools.count()
_CLIENT_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_LOGGED_PREFIXES = ("/v1/", "/tokenize", "/detokenize")
_MAX_LOGGED_PATH = 256


class Boundary:
    """Wraps the whole app.  Each finished record is given to all ``writers``: what one of them
    sums up is the sum of what another writes down.  ``content`` is what the log keeps of a
    request whose key says nothing else; None keeps no log."""

    def __init__(
        self,
        app: ASGIApp,
        writers: Sequence[Callable[[RequestRecord], None]],
        clock: Callable[[], float],
        now: Callable[[], float],
        content: LogContent | None = None,
    ) -> None:
        self._app = app
        self._writers = writers
        self._content = content
        self._clock = clock
        self._now = now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = self._new_record(scope)
        scope.setdefault("state", {})["record"] = record
        arrived = self._clock()
        streaming = False

        async def send_with_id(message: Message) -> None:
            nonlocal streaming
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = record.request_id
                if record.headers:
                    headers.update(record.headers)
                streaming = headers.get("content-type", "").startswith("text/event-stream")
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            _left(record, connection_of(scope))
        except asyncio.CancelledError:
            record.outcome = record.outcome or "shutdown"  # nothing else cancels a request
            raise
        except Exception:  # the one place for what nobody expected
            logger.exception("Request %s failed", record.request_id)
            record.error = "unexpected"
            if record.status is None:
                await error_response(ServerFault())(scope, receive, send_with_id)
            elif streaming:
                await send({"type": "http.response.body", "body": error_event(ServerFault())})
            else:
                raise
        finally:
            record.total_s = self._clock() - arrived
            self._finish(record)

    def _new_record(self, scope: Scope) -> RequestRecord:
        given = header(scope, b"x-request-id")
        request_id = (
            given.decode()
            if given and _CLIENT_ID.fullmatch(given)
            else f"req-{_PROCESS}{next(_numbers):016x}"
        )
        client = scope.get("client")
        return RequestRecord(
            time=self._now(),
            request_id=request_id,
            method=scope["method"],
            path=scope["path"][:_MAX_LOGGED_PATH],
            content=self._content,
            client=client[0] if client else None,
        )

    def _finish(self, record: RequestRecord) -> None:
        if record.outcome is None:
            record.outcome = outcome_of(record.status, record.error)
        if record.path.startswith(_LOGGED_PREFIXES):
            for write in self._writers:
                write(record)


def _left(record: RequestRecord, connection: Connection | None) -> None:
    """The client has left, or was sent away by the connection itself."""
    refusal = connection.refusal if connection is not None else None
    if refusal is not None and record.status is None:
        record.status, record.error = refusal.status, refusal.code or refusal.type
    elif record.error is None:  # else it had failed before
        record.outcome = "abandoned"
