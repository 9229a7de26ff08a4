"""What a prompt is made of before it is token ids.

There are two kinds of text in a prompt and they never mix.  ``Literal`` text was written by
a template: control tokens in it are meant.  ``Plain`` text came from a client: whatever it
looks like, it is text.  The type, not the spelling, decides how it is encoded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ochat_serve.generation import Conversation


@dataclass(frozen=True, slots=True)
class Literal:
    """Text of the template's own; its control tokens become control tokens."""

    text: str


@dataclass(frozen=True, slots=True)
class Plain:
    """Text from outside; nothing in it becomes a control token.

    With ``inside`` it stands within a prompt that is one text: without the space that some
    tokenizers put in front of a prompt.
    """

    text: str
    inside: bool = False


Segment = Literal | Plain


class Template(Protocol):
    """A prompt format.  Pure: it knows strings and roles, no tokenizer."""

    @property
    def name(self) -> str: ...

    @property
    def end_of_turn(self) -> str | None:
        """The control token that ends a turn, if the format has one."""
        ...

    @property
    def default_temperature(self) -> float: ...

    @property
    def uses_condition(self) -> bool: ...

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's beginning-of-sequence token goes in front."""
        ...

    @property
    def reads_texts(self) -> bool:
        """Whether rendering reads every text, and so costs the more the longer they are."""
        ...

    def segments(self, conversation: Conversation) -> Sequence[Segment]:
        """The prompt in order.  Raises ``errors.InvalidRequest`` for what the format cannot say."""
        ...


class SegmentEncoder(Protocol):
    """What a template needs from a tokenizer."""

    @property
    def bos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def begins_with_space(self) -> bool:
        """Whether a text encoded on its own starts with a space that is not in it."""
        ...

    @property
    def inline_chars(self) -> int:
        """No more than so many characters are encoded at once; more wait for their turn."""
        ...

    def token_id(self, token: str) -> int | None:
        """The id of one control token, or None where the vocabulary lacks it."""
        ...

    async def encode(
        self,
        chars: int,
        segments: Callable[[], Sequence[Segment]],
        max_tokens: int | None = None,
        cache_salt: str | None = None,
    ) -> list[int]:
        """The ids of what ``segments()`` gives.  ``chars`` tells what that call costs, as so many
        characters to encode; much is rendered and encoded off the event loop.  Raises
        ``errors.ContextLengthExceeded`` where more than ``max_tokens`` are certain beforehand.
        What is remembered serves the same ``cache_salt`` only."""
        ...

    async def decode(self, token_ids: Sequence[int], cache_salt: str | None = None) -> str:
        """The text, control tokens spelled out."""
        ...

    async def token_strs(
        self, token_ids: Sequence[int], cache_salt: str | None = None
    ) -> list[str]: ...


def join_system(conversation: Conversation) -> tuple[str, Conversation]:
    """All system messages as one text, and the conversation without them.

    Surrounding white space goes, as in the reference; several are joined by an empty line.
    """
    if not any(turn.role == "system" for turn in conversation.turns):
        return "", conversation
    system = [turn.text.strip() for turn in conversation.turns if turn.role == "system"]
    others = tuple(turn for turn in conversation.turns if turn.role != "system")
    return "\n\n".join(filter(None, system)), Conversation(others, conversation.condition)
