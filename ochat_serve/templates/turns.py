"""Formats made of turns: a header that names the role, the text, a token that ends the turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal as OneOf

from ochat_serve.generation import Conversation
from ochat_serve.templates.segments import Literal, Plain, Segment, join_system

OPENCHAT = "openchat"
Role = OneOf["system", "user", "assistant"]


@dataclass(frozen=True)
class TurnTemplate:
    """One row of the registry.

    A header is ``before`` + role + ``after``.  Formats with a ``condition`` (OpenChat's
    C-RLFT prefix: "GPT4 Correct") put it before the role; a client may choose it, so it is
    encoded as plain text like any other word from outside.
    """

    name: str
    end_of_turn: str
    roles: Mapping[Role, str]
    before: str = ""
    after: str = ""
    condition: str | None = None
    system: OneOf["turn", "bare", "first_user"] = "turn"
    aliases: tuple[str, ...] = ()
    name_pattern: str | None = None
    max_model_len: int = 8192
    default_temperature: float = 1.0
    owned_by: str = "ochat_serve"
    adds_bos: bool = True
    reads_texts: bool = False

    @property
    def is_openchat(self) -> bool:
        return self.owned_by == OPENCHAT

    @property
    def uses_condition(self) -> bool:
        return self.condition is not None

    def header(self, role: Role, condition: str = "") -> tuple[Segment, ...]:
        """The header of a turn: what stands before the text."""
        if self.condition is None or role == "system":
            return (Literal(self.before + self.roles[role] + self.after),)
        text = f"{condition or self.condition} {self.roles[role]}".strip()
        return tuple(
            part for part in (Literal(self.before), Plain(text), Literal(self.after)) if part.text
        )

    def segments(self, conversation: Conversation) -> Sequence[Segment]:
        """Every turn, then an open one for the assistant.

        A last message by the assistant stays open and is continued.
        """
        system, chat = join_system(conversation)
        turns = [(turn.role, turn.text) for turn in chat.turns]
        headers = {role: self.header(role, chat.condition) for role in self.roles}
        end = Literal(self.end_of_turn)
        if system and self.system == "first_user":
            turns = _into_first_user(system, turns)
            system = ""
        parts: list[Segment] = []
        if system:
            parts += headers["system"] if self.system == "turn" else ()
            parts += (Plain(system), end)
        if not turns or turns[-1][0] != "assistant":
            turns.append(("assistant", ""))
        for role, text in turns:
            parts += (*headers[role], Plain(text), end)
        return parts[:-1]


def _into_first_user(system: str, turns: list[tuple[Role, str]]) -> list[tuple[Role, str]]:
    """For formats without a system turn: the first user's text begins with it."""
    for position, (role, text) in enumerate(turns):
        if role == "user":
            return [*turns[:position], ("user", f"{system}\n\n{text}"), *turns[position + 1 :]]
    return [("user", system), *turns]
