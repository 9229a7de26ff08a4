"""Loaded vocabularies, real and crafted, with what a test asks of one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ochat_serve.generation import ChatTurn, Conversation
from ochat_serve.templates.hf import HfTemplate
from ochat_serve.templates.registry import TEMPLATES
from ochat_serve.templates.renderer import TemplateRenderer
from ochat_serve.tokenizer import Tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """One tokenizer twice: ours, and Hugging Face's own to compare with."""

    hf: PreTrainedTokenizerBase
    tokenizer: Tokenizer
    own_chat_template: str | None

    @classmethod
    def load(cls, folder: Path) -> "Vocabulary":
        return cls.of(AutoTokenizer.from_pretrained(str(folder)))

    @classmethod
    def of(cls, hf: PreTrainedTokenizerBase) -> "Vocabulary":
        return cls(hf, Tokenizer(hf), hf.chat_template)

    @property
    def added(self) -> dict[str, int]:
        """Every token that was added to the model's words; in the vocabularies here each of
        them structures prompts, so this is what no text may become."""
        return self.hf.get_added_vocab()

    def controls(self, token_ids: Iterable[int]) -> list[int]:
        """The control tokens of a prompt, in order."""
        control_ids = set(self.added.values())
        return [token_id for token_id in token_ids if token_id in control_ids]

    def spelled(self, token_ids: Iterable[int]) -> str:
        """The text that token ids stand for."""
        return b"".join(map(self.tokenizer.token_bytes, token_ids)).decode()

    def registry(self, name: str) -> TemplateRenderer:
        return TemplateRenderer(TEMPLATES[name], self.tokenizer)

    def template(self, chat_template: str) -> HfTemplate:
        """This chat template, and the tokenizer's own until the next one."""
        self.hf.chat_template = chat_template
        return HfTemplate(self.tokenizer.chat_template(), self.tokenizer.control_tokens)

    def chat(self, chat_template: str) -> TemplateRenderer:
        return TemplateRenderer(self.template(chat_template), self.tokenizer)

    def prompt(self, conversation: Conversation) -> str:
        """The prompt as text, the way everybody else makes it."""
        messages = [{"role": turn.role, "content": turn.text} for turn in conversation.turns]
        return self.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def plain_way(self, conversation: Conversation) -> list[int]:
        """The prompt's token ids, the way everybody else makes them."""
        return self.hf.encode(self.prompt(conversation), add_special_tokens=False)


def conversation(*turns: tuple[str, str], condition: str = "") -> Conversation:
    """``conversation(("user", "Hello"))``."""
    return Conversation(tuple(ChatTurn(role, text) for role, text in turns), condition)


def byte_vocabulary(
    *controls: AddedToken, normalizer: normalizers.Normalizer | None = None
) -> Vocabulary:
    """A word for each byte, no merges, and these tokens."""
    words = {char: place for place, char in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    backend = Backend(models.BPE(words, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens(list(controls))
    return Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=backend))


def with_more_tokens(folder: Path, tokens: Sequence[str]) -> Vocabulary:
    """A folder's vocabulary with tokens that structure prompts without being called special."""
    hf = AutoTokenizer.from_pretrained(str(folder))
    hf.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return Vocabulary.of(hf)
