"""The bound by which a prompt is refused without being encoded: it holds, or there is none."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from ochat_serve.errors import ContextLengthExceeded
from ochat_serve.templates.segments import Literal, Plain
from ochat_serve.token_bytes import LongestToken
from ochat_serve.tokenizer import Tokenizer
from tests.vocabularies import Vocabulary, conversation

NAMES = ("llama3", "mistral", "demo")


@pytest.fixture(params=NAMES)
def vocabulary(request) -> Vocabulary:
    return request.getfixturevalue(request.param)


def holds(tokenizer: Tokenizer, text: str) -> bool:
    return tokenizer._longest.fewest_tokens([text]) <= len(tokenizer.encode_plain(text))


@pytest.mark.parametrize(
    "text",
    [" ", "a", "/", "=", "\n", "\t", "Ġ", "▁", "你好", "\N{ROCKET}", "e\u0301", "<|eot_id|>"],
)
def test_it_holds_for_what_has_long_tokens(vocabulary, text):
    for size in (1, 15, 16, 80, 128, 1_000):
        assert holds(vocabulary.tokenizer, text * size)


def test_it_holds_for_the_longest_tokens_of_all(vocabulary):
    tokenizer = vocabulary.tokenizer
    ids = vocabulary.hf.get_vocab().values()
    texts = [tokenizer.token_bytes(token_id).decode(errors="ignore") for token_id in ids]
    longest = sorted(texts, key=len)[-200:]
    assert len(longest[0]) > tokenizer._longest.size / 10, "the test is void"
    assert all(holds(tokenizer, text * 20) for text in longest)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(text=st.text(), times=st.integers(1, 50))
def test_it_holds_for_any_text(llama3, mistral, demo, text, times):
    for vocabulary in (llama3, mistral, demo):
        assert holds(vocabulary.tokenizer, text * times)


def bpe(
    normalizer: normalizers.Normalizer | None = None,
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None,
    *added: AddedToken,
    missing: str = "",
) -> Tokenizer:
    words = [char for char in pre_tokenizers.ByteLevel.alphabet() if char not in missing]
    backend = Backend(models.BPE({word: place for place, word in enumerate(words)}, []))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    steps = [pre_tokenizer, level] if pre_tokenizer else [level]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens(list(added))
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


# name: (tokenizer, a text that it makes shorter than its letters say)
SHRINKING = {
    "composed": (bpe(normalizers.NFC()), "\u03b1\u0313\u0300\u0345" * 50),
    "letters": (bpe(normalizers.NFKC()), "\N{MATHEMATICAL BOLD CAPITAL A}" * 50),
    "kelvin": (bpe(normalizers.Lowercase()), "\N{KELVIN SIGN}" * 50),
    "twice": (
        bpe(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
        "\N{MATHEMATICAL BOLD CAPITAL A}\N{KELVIN SIGN}" * 50,
    ),
}


@pytest.mark.parametrize("name", SHRINKING)
def test_it_holds_where_a_text_is_made_shorter(name):
    tokenizer, text = SHRINKING[name]
    assert len(text.encode()) > len(tokenizer.encode_plain(text)), "the test is void"
    assert holds(tokenizer, text)


def test_what_is_made_shorter_twice_may_be_that_much_shorter():
    assert SHRINKING["twice"][0]._longest.size == 4 * SHRINKING["letters"][0]._longest.size


def other_model(model: models.Model) -> Tokenizer:
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


LETTERS = {char: place for place, char in enumerate(pre_tokenizers.ByteLevel.alphabet())}
UNKNOWN = {"<unk>": 0, "a": 1}
WITHOUT_BOUND = {
    "strips": bpe(normalizers.Strip()),
    "accents": bpe(normalizers.StripAccents()),
    "nmt": bpe(normalizers.Sequence([normalizers.NFC(), normalizers.Nmt()])),
    "pattern": bpe(normalizers.Replace(Regex(" +"), " ")),
    "shorter": bpe(normalizers.Replace("aa", "b")),
    "fewer letters": bpe(normalizers.Replace("aa", "é")),
    "nothing": bpe(normalizers.Replace("a", "")),
    "white space": bpe(None, pre_tokenizers.WhitespaceSplit()),
    "removed": bpe(None, pre_tokenizers.Split(" ", "removed")),
    "punctuation": bpe(None, pre_tokenizers.Punctuation("removed")),
    "a byte is missing": bpe(normalizers.NFC(), missing="a"),
    "swallows": bpe(None, None, AddedToken("word", lstrip=True, normalized=False)),
    "no bytes": Tokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=Backend(models.BPE(UNKNOWN, [], unk_token="<unk>"))
        )
    ),
    "words": other_model(models.WordLevel(LETTERS | {"<unk>": 999}, unk_token="<unk>")),
    "pieces": other_model(models.WordPiece(LETTERS | {"[UNK]": 999})),
    "unigram": other_model(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)),
}
WITH_BOUND = {
    "plain": bpe(),
    "longer": bpe(normalizers.Replace(" ", "▁")),
    "isolated": bpe(None, pre_tokenizers.Split(" ", "isolated")),
    "a word is added": bpe(None, None, AddedToken("word", normalized=False)),
    "a control token swallows": bpe(None, None, AddedToken("<x>", rstrip=True, normalized=False)),
}


@pytest.mark.parametrize("name", WITHOUT_BOUND)
def test_there_is_none_where_text_can_vanish(name):
    assert WITHOUT_BOUND[name]._longest is None


@pytest.mark.parametrize("name", WITH_BOUND)
def test_there_is_one_where_nothing_vanishes(name):
    assert WITH_BOUND[name]._longest is not None


def test_what_a_vocabulary_lacks_counts_for_nothing(demo):
    """The demo model's has no token for some bytes, and makes nothing of them."""
    for tokenizer, text in ((bpe(missing="a"), "a"), (demo.tokenizer, "\x04")):
        assert list(tokenizer.encode_plain(text * 100)) == []
        assert tokenizer._longest.fewest_tokens([text * 100]) == 0
        assert tokenizer._longest.fewest_tokens([text + "b"]) == 1


def test_an_added_word_can_be_the_longest():
    assert WITH_BOUND["plain"]._longest == LongestToken(1, in_bytes=True)
    assert WITH_BOUND["a word is added"]._longest == LongestToken(4, in_bytes=True)


async def test_what_cannot_fit_is_refused_without_being_encoded(vocabulary):
    longest = vocabulary.tokenizer._longest.size
    tokenizer = Counting(vocabulary.hf)
    for sizes in ([100 * longest + 1], [50 * longest, 50 * longest, 1]):
        parts = [Literal("<|eot_id|>"), *(Plain("x" * size) for size in sizes)]
        for chars in (0, 10**6):  # here, or in a worker
            with pytest.raises(ContextLengthExceeded, match="at least 101 tokens") as refusal:
                await tokenizer.encode(chars, lambda parts=parts: parts, 100)
            assert refusal.value.code == "context_length_exceeded"
    assert tokenizer.encoded == 0
    assert await tokenizer.encode(0, lambda: [Plain("x" * 100 * longest)], 100)
    assert await tokenizer.encode(0, lambda: [Plain("x" * 100 * longest), Plain("x")])


class Counting(Tokenizer):
    """Counts the characters that are really encoded."""

    encoded = 0

    def _encode_plain(self, text, backend):
        self.encoded += len(text)
        return super()._encode_plain(text, backend)


async def test_without_a_bound_everything_is_encoded():
    assert len(await WITHOUT_BOUND["strips"].encode(0, lambda: [Plain("x" * 50)], 1)) == 50


async def test_a_prompt_is_refused_by_its_messages(llama3):
    long = conversation(("user", "x" * 128 * 51), ("assistant", "x" * 128 * 50), ("user", "x"))
    with pytest.raises(ContextLengthExceeded):
        await llama3.registry("openchat_3.6").render(long, 100)


async def test_what_a_template_leaves_out_does_not_count(demo):
    """Some drop what was thought aloud in earlier turns."""
    last = "{% for m in messages[-1:] %}{{ m['content'] }}{% endfor %}"
    long = conversation(("user", "x" * 10**6), ("assistant", "y"), ("user", "z"))
    assert len(await demo.chat(last).render(long, 10)) == 1


def test_the_vocabularies_are_what_the_numbers_were_chosen_for(llama3, mistral, demo):
    sizes = [vocabulary.tokenizer._longest for vocabulary in (llama3, mistral, demo)]
    assert [(longest.size, longest.in_bytes) for longest in sizes] == [
        (128, True),
        (16, False),
        (81, True),
    ]
