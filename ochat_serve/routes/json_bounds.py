"""How much structure a JSON body may have, found out before an object is made of any of it.

Reading JSON holds the interpreter's lock from the first byte to the last, in a worker thread too.
Four megabytes of text take some milliseconds; four megabytes of ``[[],[],...]`` take half a
second and 140 MB.
"""

from ochat_serve.errors import InvalidRequest

# The largest conversation of text parts has some 12,000.  So many are read in 10 ms.
MAX_VALUES = 32_768
# Beside them, where a body may hold token ids: 262,144 in a list are read in 10 ms, too.
MAX_TOKEN_IDS = 262_144
# pydantic's JSON reader goes no deeper.
MAX_DEPTH = 200
_OPENING = (b"[", b"{", b",")
_STRUCTURE = (b"[", b"{", b":")


def check_values(body: bytes, most: int = MAX_VALUES, most_ids: int = 0) -> None:
    """Raises ``InvalidRequest`` for JSON with more values than ``most``, beside ``most_ids`` that
    are neither lists nor objects nor have a name; what is no JSON may pass.  Megabytes take some
    milliseconds."""
    if len(body) <= most or _count(body, _OPENING) <= most:
        return
    # Without strings.  Escapes that matter are those of quotes, and of the backslash before one.
    body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    quotes = body.count(b'"')
    if quotes > 4 * most + 2:  # a value has one string, and one more for its name
        raise _too_many(quotes // 4, most)
    body = b"".join(body.split(b'"')[::2])
    # Values in lists and objects, and these themselves; at least so many.
    values = _count(body, _OPENING)
    if values > most + most_ids:
        raise _too_many(values, most + most_ids)
    if most_ids and (structure := _count(body, _STRUCTURE)) > most:
        raise _too_many(structure, most)


def _count(json: bytes, marks: tuple[bytes, ...]) -> int:
    return sum(json.count(mark) for mark in marks)


def _too_many(values: int, most: int) -> InvalidRequest:
    return InvalidRequest(
        f"The JSON body of your request has {values} values in lists and objects, or more; "
        f"this server takes {most}."
    )
