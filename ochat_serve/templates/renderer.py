"""A template and a tokenizer, together: messages in, token ids out."""

from collections.abc import Sequence
from functools import partial

from ochat_serve.errors import StartupError
from ochat_serve.generation import Conversation
from ochat_serve.templates.segments import Plain, SegmentEncoder, Template

# What rendering a message costs beside its text, in characters' worth of encoding.
_TURN_CHARS = 40


class TemplateRenderer:
    """``generation.PromptRenderer`` over one template and one tokenizer."""

    def __init__(self, template: Template, encoder: SegmentEncoder) -> None:
        self._template = template
        self._encoder = encoder
        self._before_text = list(encoder.bos_token_ids)
        self._bos = self._before_text if template.adds_bos else []
        self.stop_token_ids = self._stop_token_ids()
        self.default_temperature = template.default_temperature
        self.uses_condition = template.uses_condition
        # Formats made of turns encode every text on its own; a chat template's prompt is one text.
        self.begins_with_space = template.adds_bos and encoder.begins_with_space

    def is_long(self, conversation: Conversation) -> bool:
        chars = _TURN_CHARS * len(conversation.turns) + _text_chars(conversation)
        return chars > self._encoder.inline_chars

    async def render(
        self,
        conversation: Conversation,
        max_tokens: int | None = None,
        cache_salt: str | None = None,
    ) -> list[int]:
        chars = _TURN_CHARS * len(conversation.turns)
        if self._template.reads_texts:
            chars += _text_chars(conversation)
        segments = partial(self._template.segments, conversation)
        return self._bos + await self._encoder.encode(chars, segments, max_tokens, cache_salt)

    async def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        cache_salt: str | None = None,
    ) -> list[int]:
        before = self._before_text if add_special_tokens else []
        ids = await self._encoder.encode(0, lambda: (Plain(text),), max_tokens, cache_salt)
        return before + ids

    async def decode(self, token_ids: Sequence[int], cache_salt: str | None = None) -> str:
        return await self._encoder.decode(token_ids, cache_salt)

    async def token_strs(
        self, token_ids: Sequence[int], cache_salt: str | None = None
    ) -> list[str]:
        return await self._encoder.token_strs(token_ids, cache_salt)

    def _stop_token_ids(self) -> tuple[int, ...]:
        token = self._template.end_of_turn
        if token is None:
            return ()
        token_id = self._encoder.token_id(token)
        if token_id is None:
            raise StartupError(
                f"The template {self._template.name} ends its turns with {token}, which this "
                "model's tokenizer does not have. Choose another --model-type."
            )
        return (token_id,)


def _text_chars(conversation: Conversation) -> int:
    return sum(len(turn.text) for turn in conversation.turns)
