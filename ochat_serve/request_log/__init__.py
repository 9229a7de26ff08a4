"""The request log: one JSON line per request, whatever became of it.

A request hands over its record and goes on.  Lines are made and written by a thread of its own,
so neither a slow disk nor a slow pattern holds up a request; what the thread cannot keep up with
is dropped and counted.
"""

from ochat_serve.request_log.aside import Retention
from ochat_serve.request_log.file import LogFile
from ochat_serve.request_log.record import Outcome, RequestRecord, outcome_of
from ochat_serve.request_log.redaction import Redaction
from ochat_serve.request_log.writer import Log, RequestLog

__all__ = [
    "Log",
    "LogFile",
    "Outcome",
    "Redaction",
    "RequestLog",
    "RequestRecord",
    "Retention",
    "outcome_of",
]
