"""A request body becomes a checked object, or an error that says what is wrong with it."""

import asyncio
import re
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from ochat_serve.errors import InvalidRequest, UnsupportedMediaType, shortened
from ochat_serve.routes.json_bounds import MAX_DEPTH, check_values
from ochat_serve.routes.replies import caller_of
from ochat_serve.routes.uploads import Upload, Uploads

Model = TypeVar("Model", bound=BaseModel)
_MAX_MESSAGE_CHARS = 300
_MAX_DROPPED = 64 * 2**20
# Checking this much takes some ten milliseconds: more goes to a worker thread.
_INLINE_BYTES = 256 * 1024
# What was given where a bound was passed, in the bound's unit.
_GIVEN: dict[str, Callable[[Any], int | float]] = {
    "string_too_long": len,
    "less_than_equal": lambda number: number,
}
# pydantic's JSON reader knows these words; JSON does not.
_NOT_JSON = (b"NaN", b"Infinity")


async def read_json(
    request: Request, model: type[Model], uploads: Uploads, max_ids: int = 0
) -> Model:
    """The body as ``model``; it may hold ``max_ids`` token ids.  Raises 413, 415, 503 or 400 as
    ``ApiError``."""
    _check_content_type(request)
    with Upload(uploads, _sender(request)) as upload:
        body = await _read(request, upload)
        if len(body) <= _INLINE_BYTES:
            return _parse(body, model, max_ids)
        return await asyncio.to_thread(_parse, body, model, max_ids)


def _parse(body: bytes, model: type[Model], max_ids: int) -> Model:
    check_values(body, most_ids=max_ids)
    if any(word in body for word in _NOT_JSON):
        _refuse_infinities(body)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid_request(error) from error


def _refuse_infinities(body: bytes) -> None:
    """Fields of ours refuse them by themselves; this is for those that are only passed on."""
    try:
        from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise _not_json(str(error)) from error


def _not_json(detail: str) -> InvalidRequest:
    if detail.startswith("recursion limit"):
        detail = f"it is nested more than {MAX_DEPTH} levels deep"
    return InvalidRequest(f"We could not parse the JSON body of your request: {detail}.")


def _check_content_type(request: Request) -> None:
    given = request.headers.get("content-type")
    kind = (given or "absent").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMediaType(
            f"The request body must be JSON: send the header 'Content-Type: application/json' "
            f"(it was '{kind[:60]}')."
        )
    # A missing type is refused too: a web page elsewhere can send such a body without asking.


async def _read(request: Request, upload: Upload) -> bytes:
    async for chunk in request.stream():
        upload.add(chunk)
        if upload.refusal is not None and upload.size > _MAX_DROPPED:
            break
    # A refusal is said after the rest was read and dropped: closing on unread input would reset
    # the connection, and the client would never see the answer.
    return upload.whole()


def _sender(request: Request) -> str | None:
    """The key; where there are none, the address."""
    return caller_of(request).name or (request.client.host if request.client else None)


def invalid_request(error: ValidationError) -> InvalidRequest:
    """The first of pydantic's errors, in OpenAI's words."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    kind, message = first["type"], first["msg"]
    param = param_name(first["loc"])
    if kind == "json_invalid":
        return _not_json(message.removeprefix("Invalid JSON: "))
    if not param:
        return InvalidRequest("The request body must be a JSON object.")
    if kind == "missing":
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param)
    if kind == "extra_forbidden":
        return InvalidRequest(
            f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter"
        )
    message = re.sub(r"^\w+ should ", "must ", message)
    message = re.sub(r" after validation(, not \d+)$", r"\1", message)
    if (given := _GIVEN.get(kind)) is not None:
        value = error.errors(include_url=False, include_context=False)[0]["input"]
        message += f", not {shortened(given(value))}"
    return InvalidRequest(
        f"Invalid value for '{param}': {message[:_MAX_MESSAGE_CHARS]}.",
        param=param,
        code="invalid_value",
    )


def param_name(location: tuple[int | str, ...]) -> str:
    """``("messages", 0, "content")`` -> ``messages.[0].content``."""
    parts = [f"[{part}]" if isinstance(part, int) else str(part)[:64] for part in location]
    return ".".join(parts)
