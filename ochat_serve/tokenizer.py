"""The tokenizer: the only importer of transformers on the road of a request.

Two encoders stand side by side.  One recognises control tokens and sees only what a
template wrote; the other is told to take every control token for plain text and sees what
came from outside.  Its result is checked all the same: no control token leaves it.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any, TypeVar

import jinja2
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ochat_serve.errors import InvalidRequest, StartupError
from ochat_serve.fair_threads import FairThreads
from ochat_serve.remembered import RememberedIds
from ochat_serve.templates.hf import ApplyTemplate, ControlToken
from ochat_serve.templates.segments import Literal, Plain, Segment
from ochat_serve.token_backend import (
    decode,
    drop_first_prefix,
    encode,
    put_together,
    taken_apart,
    token_strs,
)
from ochat_serve.token_bytes import LongestToken, longest_token, spelling

# Added tokens of this shape structure prompts even when the model does not call them special
# (<think>, <tool_call>, [INST]); other added tokens are words or white space.
_CONTROL_SHAPE = re.compile(r"\s*[<\[{].*[>\]}]\s*", re.DOTALL)
# Encoding this much takes about a millisecond: more goes to a worker thread.
_INLINE_CHARS = 4_000
# Decoding this much, too.
_INLINE_TOKENS = 4_000
_WORKERS = 2
_CACHED_LITERAL_CHARS = 64
REMEMBER_BYTES = 64 * 2**20
T = TypeVar("T")


class Tokenizer:
    """``templates.SegmentEncoder`` over a Hugging Face tokenizer."""

    inline_chars = _INLINE_CHARS

    def __init__(
        self, hf_tokenizer: PreTrainedTokenizerBase, *, remember_bytes: int = REMEMBER_BYTES
    ) -> None:
        backend = getattr(hf_tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Backend):
            raise StartupError(
                f"The tokenizer class {type(hf_tokenizer).__name__} has no tokenizer.json form, "
                "which is needed to keep users' text apart from control tokens."
            )
        self._hf = hf_tokenizer
        spec, model = taken_apart(backend)
        self._recognising, self._plain, self._inside, self._controls = _split(backend, spec, model)
        self._control_ids = frozenset(
            token_id
            for token in self._controls
            if (token_id := self._recognising.token_to_id(token.text)) is not None
        )
        self._control_texts = re.compile(
            "|".join(re.escape(token.text) for token in self._controls) or r"(?!)"
        )
        self.bos_token_ids = _in_front_of_every_text(hf_tokenizer)
        self._remembered = RememberedIds(remember_bytes)
        self._workers = FairThreads(_WORKERS, "tokenize")
        self._encode_literal = lru_cache(maxsize=256)(self._recognise)
        self._token_bytes = lru_cache(maxsize=None)(_token_bytes_of(backend, spec))
        self._longest = _longest_token(backend, spec)

    @classmethod
    def load(
        cls, model: str, *, remember_bytes: int = REMEMBER_BYTES, **options: Any
    ) -> "Tokenizer":
        """Load the tokenizer of a model folder or hub id.  Raises ``StartupError``."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(model, **options)
            return cls(tokenizer, remember_bytes=remember_bytes)
        except StartupError:
            raise
        except Exception as error:  # tokenizers raises nothing narrower
            reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
            raise StartupError(f"The tokenizer of {model} cannot be loaded: {reason}.") from error

    @property
    def control_tokens(self) -> tuple[ControlToken, ...]:
        return self._controls

    def token_id(self, token: str) -> int | None:
        token_id: int | None = self._recognising.token_to_id(token)
        return token_id

    def is_control(self, token_id: int) -> bool:
        return token_id in self._control_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; b"" for an id outside the vocabulary."""
        return self._token_bytes(token_id)

    @property
    def begins_with_space(self) -> bool:
        """Whether every text encoded on its own starts with a space that is not in the text
        (SentencePiece's dummy prefix), as the model's answers then do."""
        ids = self.encode_plain("a")
        return bool(ids) and self.token_bytes(ids[0]).startswith(b" ")

    async def encode(
        self,
        chars: int,
        segments: Callable[[], Sequence[Segment]],
        max_tokens: int | None = None,
        cache_salt: str | None = None,
    ) -> list[int]:
        """The segments' token ids, in order.  Much is rendered and encoded off the event loop,
        in turn for each salt; ``chars`` tells how much rendering them costs.  Raises
        ``ContextLengthExceeded``, without encoding, for what surely has more than
        ``max_tokens``."""

        def rendered() -> Sequence[Segment]:
            parts = segments()
            if max_tokens is not None and self._longest is not None:
                texts = [part.text for part in parts if isinstance(part, Plain)]
                self._longest.check(texts, max_tokens)
            return parts

        if chars > _INLINE_CHARS:
            return await self._workers.run(
                cache_salt, lambda: self.encode_now(rendered(), cache_salt)
            )
        parts = rendered()
        if self._new_chars(parts, cache_salt) > _INLINE_CHARS:
            return await self._workers.run(cache_salt, lambda: self.encode_now(parts, cache_salt))
        return self.encode_now(parts, cache_salt)

    async def decode(self, token_ids: Sequence[int], cache_salt: str | None = None) -> str:
        return await self._of_tokens(decode, token_ids, cache_salt)

    async def token_strs(
        self, token_ids: Sequence[int], cache_salt: str | None = None
    ) -> list[str]:
        return await self._of_tokens(token_strs, token_ids, cache_salt)

    async def _of_tokens(
        self,
        ask: Callable[[Backend, Sequence[int]], T],
        token_ids: Sequence[int],
        cache_salt: str | None,
    ) -> T:
        """Of many tokens by a thread, in turn for each salt."""
        if len(token_ids) <= _INLINE_TOKENS:
            return ask(self._recognising, token_ids)
        return await self._workers.run(cache_salt, lambda: ask(self._recognising, token_ids))

    def _new_chars(self, segments: Iterable[Segment], salt: str | None) -> int:
        """How much there is to encode that is not remembered."""
        return sum(
            len(segment.text)
            for segment in segments
            if isinstance(segment, Plain)
            and self._key(segment.text, segment.inside, salt) not in self._remembered
        )

    def encode_now(self, segments: Iterable[Segment], salt: str | None = None) -> list[int]:
        ids: list[int] = []
        for segment in segments:
            if isinstance(segment, Literal):
                ids += self.encode_literal(segment.text)
            else:
                ids += self.encode_plain(segment.text, inside=segment.inside, salt=salt)
        return ids

    def encode_literal(self, text: str) -> Sequence[int]:
        """Token ids of a template's own text."""
        if len(text) <= _CACHED_LITERAL_CHARS:
            return self._encode_literal(text)
        return self._recognise(text)

    def encode_plain(
        self, text: str, *, inside: bool = False, salt: str | None = None
    ) -> Sequence[int]:
        """Token ids of text from outside: never a control token."""
        if not text:
            return ()
        key = self._key(text, inside, salt)
        ids = self._remembered.get(key)
        if ids is None:
            ids = self._encode_plain(text, self._inside if inside else self._plain)
            self._remembered.put(key, ids)
        return ids

    def _key(self, text: str, inside: bool, salt: str | None) -> tuple[str, Hashable]:
        """What tells encodings apart: most vocabularies know no difference inside a prompt; and
        callers, or the time that encoding takes would tell one what another has said."""
        return text, (inside and self._inside is not self._plain, salt)

    def _encode_plain(self, text: str, backend: Backend) -> list[int]:
        ids = encode(backend, text)
        if self._control_ids.isdisjoint(ids):
            return ids
        return self._encode_in_parts(text, backend)

    def _encode_in_parts(self, text: str, backend: Backend) -> list[int]:
        """For vocabularies whose plain words include a control token: cut every one in two."""
        ids: list[int] = []
        start = 0
        for found in self._control_texts.finditer(text):
            cut = found.start() + 1
            ids += encode(backend, text[start:cut])
            backend = self._inside
            start = cut
        ids += encode(backend, text[start:])
        # What is left is a control token spelled by normalisation alone: it says nothing.
        return [token_id for token_id in ids if token_id not in self._control_ids]

    def _recognise(self, text: str) -> Sequence[int]:
        ids: list[int] = self._recognising.encode(text, add_special_tokens=False).ids
        return ids

    def chat_template(self) -> ApplyTemplate:
        """The model's own chat template as a function.  Raises ``StartupError`` if it has none."""
        if not self._hf.chat_template:
            raise StartupError(
                "This model's tokenizer has no chat template. Choose one with --model-type."
            )

        def apply(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
            try:
                prompt = self._hf.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            except jinja2.TemplateSyntaxError:
                raise
            except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
                raise InvalidRequest(
                    f"The model's chat template refuses these messages: {error}", param="messages"
                ) from error
            return str(prompt)

        try:
            apply([{"role": "user", "content": "Hi"}], True)
        except InvalidRequest:
            pass  # it may want another conversation; requests will tell
        except jinja2.TemplateSyntaxError as error:
            raise StartupError(f"This model's chat template is not valid: {error}.") from error
        return apply


def _in_front_of_every_text(hf_tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What an empty text becomes, up to the end of text that some tokenizers add."""
    bos, eos = hf_tokenizer.bos_token_id, hf_tokenizer.eos_token_id
    ids = hf_tokenizer("").input_ids
    return tuple(takewhile(lambda token_id: token_id == bos or token_id != eos, ids))


def _split(
    backend: Backend, spec: dict[str, Any], model: str
) -> tuple[Backend, Backend, Backend, tuple[ControlToken, ...]]:
    """One that recognises control tokens, two that never do (for a text on its own, and for
    one inside a prompt), and the control tokens.  The first is ``backend`` itself: a
    copy of Llama-3's vocabulary takes some 40 MB."""
    controls = []
    for token in spec["added_tokens"]:
        if token["special"] or _CONTROL_SHAPE.fullmatch(token["content"]):
            token["special"] = True
            controls.append(ControlToken(token["content"], token["lstrip"], token["rstrip"]))
    plain = inside = put_together(spec, model)
    if drop_first_prefix(spec["pre_tokenizer"]):
        inside = put_together(spec, model)
    plain.encode_special_tokens = inside.encode_special_tokens = True
    return backend, plain, inside, tuple(controls)


def _longest_token(backend: Backend, spec: dict[str, Any]) -> LongestToken | None:
    if not isinstance(backend.model, models.BPE):
        return None
    return longest_token(spec, backend.get_vocab(), byte_fallback=backend.model.byte_fallback)


def _token_bytes_of(backend: Backend, spec: dict[str, Any]) -> Callable[[int], bytes]:
    added = {token["id"]: token["content"].encode() for token in spec["added_tokens"]}
    spell = spelling(spec)

    def token_bytes(token_id: int) -> bytes:
        if token_id in added:
            return bytes(added[token_id])
        token: str | None = backend.id_to_token(token_id)
        return b"" if token is None else spell(token)

    return token_bytes
