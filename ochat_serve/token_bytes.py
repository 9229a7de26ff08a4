"""How tokens spell text: the bytes of each, and how much one can stand for at most.

By the second a prompt of megabytes is refused without being encoded.  It is a bound that holds for
every text, or none: a tokenizer with a part that is not listed here may drop text, or make one
token of any number of characters.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ochat_serve.errors import ContextLengthExceeded


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character: itself where it is one, else
    the next character from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + position): byte for position, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_FALLBACK_WORDS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def spelling(spec: Mapping[str, Any]) -> Callable[[str], bytes]:
    """How the tokens of a tokenizer.json spell bytes: byte-level BPE, or SentencePiece."""
    steps = json.dumps([spec.get("decoder"), spec.get("pre_tokenizer")])
    return _byte_level if '"ByteLevel"' in steps else _sentencepiece


def _byte_level(token: str) -> bytes:
    if all(char in _BYTE_OF for char in token):
        return bytes(_BYTE_OF[char] for char in token)
    return token.encode()


def _sentencepiece(token: str) -> bytes:
    if token in _FALLBACK_WORDS:
        return bytes([int(token[3:5], 16)])
    return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


# Normalisers, with how many times shorter they can make a text (composing, or writing mathematical
# letters as plain ones: four bytes become one).
_SHRINKS = {
    "ByteLevel": 1,
    "Prepend": 1,
    "Lowercase": 4,
    "NFC": 4,
    "NFD": 4,
    "NFKC": 4,
    "NFKD": 4,
}
# Pre-tokenizers that cut a text and leave nothing out; the second row unless they "remove".
_CUTS = {"ByteLevel", "Metaspace", "Digits", "UnicodeScripts"}
_CUTS_IF_KEPT = {"Split", "Punctuation"}


@dataclass(frozen=True, slots=True)
class LongestToken:
    """``size`` counts UTF-8 bytes or characters.  ``unknown`` bytes count for nothing: a
    vocabulary that lacks some drops them."""

    size: int
    in_bytes: bool
    unknown: bytes = b""

    def fewest_tokens(self, texts: Iterable[str]) -> int:
        """No fewer tokens than this stand for all of ``texts``."""
        return -(-sum(map(self._size, texts)) // self.size)

    def _size(self, text: str) -> int:
        return len(text.encode().translate(None, self.unknown)) if self.in_bytes else len(text)

    def check(self, texts: Sequence[str], max_tokens: int) -> None:
        """Raises ``ContextLengthExceeded`` for what surely has more tokens."""
        if 4 * sum(map(len, texts)) <= max_tokens * self.size:  # no character has more bytes
            return
        fewest = self.fewest_tokens(texts)
        if fewest > max_tokens:
            raise ContextLengthExceeded(max_tokens, fewest, at_least=True)


def longest_token(
    spec: Mapping[str, Any], words: Iterable[str], *, byte_fallback: bool
) -> LongestToken | None:
    """Of a BPE tokenizer: ``spec`` is its tokenizer.json, ``words`` its vocabulary.

    None where the length of a text says nothing about the number of its tokens.
    """
    vocabulary = frozenset(words)
    in_bytes = _spells_bytes(spec)
    unknown = bytes(byte for letter, byte in _BYTE_OF.items() if letter not in vocabulary)
    if not in_bytes and not (byte_fallback and vocabulary >= _FALLBACK_WORDS):
        return None  # an unknown character is dropped, or melts into its neighbours
    shrinks = _normaliser_shrinks(spec.get("normalizer"))
    if shrinks is None or (shrinks > 1 and in_bytes and unknown):
        return None
    if not _keeps_all(spec.get("pre_tokenizer")) or any(map(_swallows, spec["added_tokens"])):
        return None
    return LongestToken(max(map(len, vocabulary)) * shrinks, in_bytes, unknown * in_bytes)


def _parts(step: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """A step of a tokenizer, or the steps of a sequence; some are nested."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [part for inner in step[name] for part in _parts(inner, name)]


def _spells_bytes(spec: Mapping[str, Any]) -> bool:
    steps = _parts(spec.get("normalizer"), "normalizers")
    steps += _parts(spec.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "ByteLevel" for step in steps)


def _normaliser_shrinks(normaliser: Mapping[str, Any] | None) -> int | None:
    shrinks = 1
    for step in _parts(normaliser, "normalizers"):
        found = 1 if _replaces_by_no_less(step) else _SHRINKS.get(step["type"])
        if found is None:
            return None
        shrinks *= found
    return shrinks


def _replaces_by_no_less(step: Mapping[str, Any]) -> bool:
    if step["type"] != "Replace":
        return False
    old, new = step["pattern"].get("String"), step["content"]
    return old is not None and len(new) >= len(old) and len(new.encode()) >= len(old.encode())


def _keeps_all(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    return all(
        step["type"] in _CUTS or (step["type"] in _CUTS_IF_KEPT and step["behavior"] != "Removed")
        for step in _parts(pre_tokenizer, "pretokenizers")
    )


def _swallows(token: Mapping[str, Any]) -> bool:
    """Whether a word takes any number of spaces beside it."""
    return not token["special"] and (token["lstrip"] or token["rstrip"])
