"""A tokenizer's backend (the package tokenizers): taken apart, put together, asked.

What takes long lets other threads run: the single forms of the backend's calls hold the
interpreter's lock to their end, the batch forms do not.
"""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as Backend

_MODEL = '"model":{'


def encode(backend: Backend, text: str) -> list[int]:
    """Token ids of a text, as the backend is set: without what stands before every text."""
    ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


def decode(backend: Backend, token_ids: Sequence[int]) -> str:
    """The text of token ids, control tokens spelled out."""
    texts: list[str] = backend.decode_batch([list(token_ids)], skip_special_tokens=False)
    return texts[0]


def token_strs(backend: Backend, token_ids: Sequence[int]) -> list[str]:
    """Each token as the vocabulary spells it; "" outside of it."""
    return [backend.id_to_token(token_id) or "" for token_id in token_ids]


def taken_apart(backend: Backend) -> tuple[dict[str, Any], str]:
    """What a tokenizer consists of, and its model (vocabulary and merges: megabytes) unread;
    without what is only for training and batches.

    The model is the last entry; before it the mark stands in no string, as quotes are escaped.
    """
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    rest, _, model = backend.to_str().partition(_MODEL)
    return json.loads(rest.rstrip(",") + "}"), model


def put_together(spec: dict[str, Any], model: str) -> Backend:
    return Backend.from_str(json.dumps(spec)[:-1] + "," + _MODEL + model)


def drop_first_prefix(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Take away the space that is put in front of a prompt only; whether there was one."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    first = [step for step in steps if step and step.get("prepend_scheme") == "first"]
    for step in first:
        step["prepend_scheme"] = "never"
    return bool(first)
