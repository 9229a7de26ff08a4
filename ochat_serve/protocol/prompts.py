"""Prompts as text and as token ids, checked in one pass.

pydantic would describe every one of 200,000 wrong values, and try each form of a prompt in turn.
"""

from typing import Any

from pydantic_core import PydanticCustomError

from ochat_serve.protocol.caps import MAX_PROMPTS
from ochat_serve.protocol.sampling import too_many


def token_ids(value: Any) -> Any:
    """A list of numbers, as it is.  How large they may be, the vocabulary tells."""
    if not isinstance(value, list) or not _are_ids(value):
        raise PydanticCustomError("token_ids", "must be a list of token ids")
    return value


def prompt(value: Any) -> Any:
    """A text, a list of texts, a list of token ids, or a list of such lists, as it is."""
    if isinstance(value, str):
        return value
    kinds = set(map(type, value)) if isinstance(value, list) else set()
    if kinds == {int} and _are_ids(value):
        return value
    if kinds in ({str}, {list}):
        if len(value) > MAX_PROMPTS:
            raise too_many(MAX_PROMPTS, len(value), "prompts")
        if kinds == {str} or all(map(_are_ids, value)):
            return value
    raise PydanticCustomError(
        "prompt", "must be a string, a list of strings, or one or more lists of token ids"
    )


def _are_ids(values: list[Any]) -> bool:
    return set(map(type, values)) <= {int} and min(values, default=0) >= 0
