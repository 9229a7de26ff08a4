"""Prompts as text and as token ids, checked in one pass.

pydantic would describe every one of 200,000 wrong values, and try each form of a prompt in turn.
"""

from typing import Any

from pydantic_core import PydanticCustomError


def token_ids(value: Any) -> Any:
    """A list of numbers, as it is.  How large they may be, the vocabulary tells."""
    if not isinstance(value, list) or not _are_ids(value):
        raise PydanticCustomError("token_ids", "must be a list of token ids")
    return value


def _are_ids(values: list[Any]) -> bool:
    return set(map(type, values)) <= {int} and min(values, default=0) >= 0
