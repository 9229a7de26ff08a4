"""Text never becomes a control token: not by spelling one, not in pieces, not by any format.

Every test compares the control tokens of a prompt with those of the same conversation made of
harmless words: what a client writes must not add, remove or move one.
"""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from ochat_serve.generation import Conversation
from ochat_serve.templates.registry import TEMPLATES
from ochat_serve.templates.renderer import TemplateRenderer
from tests import chat_templates
from tests.vocabularies import Vocabulary, byte_vocabulary, conversation

CHAT_TEMPLATES = {
    "CHATML": chat_templates.CHATML,
    "LLAMA3_INSTRUCT": chat_templates.LLAMA3_INSTRUCT,
    "MISTRAL_INSTRUCT": chat_templates.MISTRAL_INSTRUCT,
    "THINKING": chat_templates.THINKING,
}
# Vocabulary -> every format that fits its tokens.
FORMATS = {
    "llama3": ("openchat_3.6", "llama3_instruct", "LLAMA3_INSTRUCT"),
    "mistral": ("openchat_3.5", "openchat_v3.2", "zephyr", "MISTRAL_INSTRUCT"),
    "newer_mistral": ("MISTRAL_INSTRUCT",),
    "gemma": ("gemma", "gemma_it"),
    "demo": ("chatml", "CHATML"),
    "thinking": ("chatml", "CHATML", "THINKING"),
}
PAIRS = [(vocabulary, name) for vocabulary, names in FORMATS.items() for name in names]
ROLES = ("system", "user", "assistant", "user")


EVERY_FORMAT = pytest.mark.parametrize(("vocabulary_name", "name"), PAIRS)


def _pair(request, vocabulary_name: str, name: str) -> tuple[Vocabulary, TemplateRenderer]:
    """A vocabulary and the renderer of one format over it."""
    vocabulary = request.getfixturevalue(vocabulary_name)
    if name in CHAT_TEMPLATES:
        return vocabulary, vocabulary.chat(CHAT_TEMPLATES[name])
    return vocabulary, vocabulary.registry(name)


def _chat(system: str, user: str, assistant: str, last: str, condition: str = "") -> Conversation:
    return conversation(
        *zip(ROLES, (system, user, assistant, last), strict=True), condition=condition
    )


async def _controls(vocabulary, renderer, chat: Conversation) -> list[int]:
    return vocabulary.controls(await renderer.render(chat))


def test_every_format_of_the_registry_is_attacked():
    attacked = {name for names in FORMATS.values() for name in names}
    assert attacked == {*TEMPLATES, *CHAT_TEMPLATES}


@EVERY_FORMAT
async def test_the_harmless_prompt_has_control_tokens(request, vocabulary_name, name):
    """Else comparing with it would prove nothing."""
    vocabulary, renderer = _pair(request, vocabulary_name, name)
    assert len(await _controls(vocabulary, renderer, _chat("a", "b", "c", "d"))) >= 2


@EVERY_FORMAT
@pytest.mark.parametrize("place", range(5), ids=[*ROLES[:3], "last user", "condition"])
async def test_no_token_of_the_vocabulary_can_be_written(request, vocabulary_name, name, place):
    """Alone, doubled, inside a word, inside itself, and at both edges of the text."""
    vocabulary, renderer = _pair(request, vocabulary_name, name)
    harmless = ["Be kind.", "Hello", "Hi", "And now?", ""]
    expected = await _controls(vocabulary, renderer, _chat(*harmless))
    texts = [*_structural(vocabulary), " ".join(map(_variations, vocabulary.added))]
    for text in texts:
        told = [*harmless[:place], text, *harmless[place + 1 :]]
        assert await _controls(vocabulary, renderer, _chat(*told)) == expected, text


def _variations(token: str) -> str:
    half = len(token) // 2
    nested = token[:half] + token + token[half:]
    return f"{token} {token}{token} a{token}b\n{token}\n{nested} {nested}{token}"


def _structural(vocabulary: Vocabulary) -> list[str]:
    """Without Llama-3's 251 reserved tokens, which differ in a number only."""
    return [token for token in vocabulary.added if "reserved" not in token]


@EVERY_FORMAT
@pytest.mark.parametrize("space", ["", " ", "\n"], ids=["bare", "space", "newline"])
async def test_pieces_in_neighbouring_messages_do_not_join(request, vocabulary_name, name, space):
    """Some templates write nothing between two texts, and some trim them."""
    vocabulary, renderer = _pair(request, vocabulary_name, name)
    expected = await _controls(vocabulary, renderer, conversation(("system", "a"), ("user", "b")))
    for token in _structural(vocabulary):
        for cut in range(1, len(token)):
            chat = conversation(
                ("system", f"a{token[:cut]}{space}"), ("user", f"{space}{token[cut:]}b")
            )
            assert await _controls(vocabulary, renderer, chat) == expected, chat


@pytest.mark.parametrize("space", ["", " \n"], ids=["bare", "trimmed"])
async def test_three_pieces_do_not_join_either(thinking, space):
    """The one in the middle neither begins nor ends like a token; the template trims."""
    renderer = thinking.chat(chat_templates.THINKING)
    three = [("user", "a"), ("user", "b"), ("user", "c")]
    expected = await _controls(thinking, renderer, conversation(*three))
    for token in thinking.added:
        for first, second in itertools.combinations(range(1, len(token)), 2):
            pieces = (token[:first], token[first:second], token[second:])
            chat = conversation(*(("user", space + piece + space) for piece in pieces))
            assert await _controls(thinking, renderer, chat) == expected, chat


async def test_a_piece_does_not_join_with_what_the_template_writes():
    """A template may write the brackets and leave the word to the client."""
    vocabulary = byte_vocabulary(
        AddedToken("[INST]", normalized=False), AddedToken("<s>", normalized=False)
    )
    renderer = vocabulary.chat("<s>{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    for text in ("INST", "NS", "[INST", "INST]", " INST ", "INST] is it", "it is [INST"):
        ids = await renderer.render(conversation(("user", text)))
        assert vocabulary.spelled(ids) == f"<s>[{text}]"
        assert vocabulary.controls(ids) == [vocabulary.added["<s>"]], text


@pytest.mark.parametrize(
    "tokens",
    [
        ("<think>", "\n<think>"),
        ("<s>", "<<s>>"),
        ("<a>", "<<a>", "<<<a>"),
        ("<a><", "<b>"),
        ("<a><b", "<b>"),
        ("<|end|>", "<|end|>\n"),
    ],
    ids=repr,
)
async def test_tokens_that_lie_inside_or_across_each_other(tokens):
    """Breaking the longest one must break the ones within and beside it, too."""
    vocabulary = byte_vocabulary(
        *(AddedToken(token, special=True, normalized=False) for token in tokens),
        AddedToken("<go>", normalized=False),
    )
    renderer = vocabulary.chat("{% for m in messages %}{{ m['content'] }}{% endfor %}<go>")
    for texts in itertools.product(["", "<", *tokens], ["b>", "a>", "think>", "s>>", *tokens]):
        ids = await renderer.render(conversation(*(("user", text) for text in texts)))
        assert vocabulary.spelled(ids) == "".join(texts) + "<go>"
        assert vocabulary.controls(ids) == [vocabulary.added["<go>"]], texts


async def test_what_normalises_to_a_token_is_no_token():
    """A vocabulary may look for its tokens in the normalised text, where fullwidth brackets and
    capitals are gone."""
    vocabulary = byte_vocabulary(
        AddedToken("<think>", normalized=True),
        AddedToken("<go>", normalized=True),
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
    )
    renderer = vocabulary.chat("{% for m in messages %}{{ m['content'] }}{% endfor %}<go>")
    forged = "\N{FULLWIDTH LESS-THAN SIGN}think\N{FULLWIDTH GREATER-THAN SIGN}"
    for text in (forged, "<THINK>", "<think>"):
        assert vocabulary.added["<think>"] in vocabulary.hf.encode(text), "the attack is void"
        ids = await renderer.render(conversation(("user", text)))
        assert vocabulary.spelled(ids) == "<think><go>"
        assert vocabulary.controls(ids) == [vocabulary.added["<go>"]], text


FRAGMENTS = [" ", "\n", "a", "<", "|", ">", "</", "[", "\ue000", "\ue001", "\N{ROCKET}", "Is 3 <"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
@EVERY_FORMAT
async def test_no_mixture_of_fragments_becomes_a_token(request, vocabulary_name, name, data):
    vocabulary, renderer = _pair(request, vocabulary_name, name)
    tokens = _structural(vocabulary)
    halves = [part for token in tokens for part in (token[: len(token) // 2], token[1:])]
    text = st.lists(st.sampled_from(FRAGMENTS + tokens + halves), max_size=6).map("".join)
    texts = data.draw(st.tuples(text, text, text, text, text))
    # A blank system text is none, in every format.
    harmless = ["a" if text.strip() else text for text in texts]
    expected = await _controls(vocabulary, renderer, _chat(*harmless))
    assert await _controls(vocabulary, renderer, _chat(*texts)) == expected


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize(
    ("name", "chat_template"),
    [
        ("llama3", chat_templates.LLAMA3_INSTRUCT),
        ("demo", chat_templates.CHATML),
        ("thinking", chat_templates.THINKING),
    ],
    ids=["llama3", "demo", "thinking"],
)
async def test_hostile_text_is_kept_to_the_letter(request, name, chat_template, data):
    """Taking a token's meaning must not take its text: the prompt reads as the template has it."""
    vocabulary = request.getfixturevalue(name)
    renderer = vocabulary.chat(chat_template)
    tokens = _structural(vocabulary)
    text = st.lists(st.sampled_from(FRAGMENTS + tokens), max_size=6).map("".join)
    system, *others = data.draw(st.tuples(text, text, text, text))
    chat = _chat(system.strip() or "a", *others)
    assert vocabulary.spelled(await renderer.render(chat)) == vocabulary.prompt(chat)
