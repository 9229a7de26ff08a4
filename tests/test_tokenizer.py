"""Text to token ids and back to bytes, over byte-level and SentencePiece vocabularies."""

import asyncio
import json
import threading

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from ochat_serve.errors import StartupError
from ochat_serve.templates.segments import Literal, Plain
from ochat_serve.tokenizer import Tokenizer
from tests import chat_templates
from tests.vocabularies import Vocabulary, byte_vocabulary, conversation

NAMES = ("llama3", "mistral", "demo")
TEXTS = [
    "Hello, world!",
    "a  b\tc\n\n  d ",
    "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET} \N{REGIONAL INDICATOR SYMBOL LETTER F}\U0001faf6",
    "你好，世界。한국어 日本語",
    "café, nai\u0308ve, नमस्ते",
    "\x00\x7f\u2028\ufffd\U00013000",
    "<0x41> and Ġ and ▁",
]


@pytest.fixture(params=NAMES)
def vocabulary(request) -> Vocabulary:
    return request.getfixturevalue(request.param)


def _byte_words() -> dict[str, int]:
    return {char: place for place, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


# The bytes of tokens


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_a_texts_tokens_are_the_texts(vocabulary, text):
    """One token alone may be a third of a character; only all together are the text."""
    ids = vocabulary.tokenizer.encode_plain(text)
    told = b"".join(map(vocabulary.tokenizer.token_bytes, ids))
    dummy_prefix = b" " if vocabulary.tokenizer.begins_with_space else b""
    mark = "▁" if vocabulary.tokenizer.begins_with_space else ""  # SentencePiece's own space
    assert told == dummy_prefix + (text.replace(mark, " ") if mark else text).encode()


@pytest.mark.parametrize("text", TEXTS[2:5])
def test_these_texts_do_split_characters(vocabulary, text):
    """Else the test above would be about nothing."""

    def is_whole(token_id: int) -> bool:
        token = vocabulary.tokenizer.token_bytes(token_id)
        return token.decode(errors="ignore").encode() == token

    assert not all(map(is_whole, vocabulary.tokenizer.encode_plain(text + "\U00013000")))


def test_every_byte_has_a_token_of_its_own_in_sentencepiece(mistral):
    falls_back = [mistral.tokenizer.token_bytes(token_id) for token_id in range(3, 259)]
    assert falls_back == [bytes([byte]) for byte in range(256)]


def test_control_tokens_are_their_own_text(vocabulary):
    for token, token_id in vocabulary.added.items():
        assert vocabulary.tokenizer.token_bytes(token_id) == token.encode()
        assert vocabulary.tokenizer.token_id(token) == token_id


def test_an_id_outside_the_vocabulary_has_no_bytes(vocabulary):
    assert vocabulary.tokenizer.token_bytes(10**6) == b""
    assert vocabulary.tokenizer.token_id("<|no such token|>") is None


def test_an_added_word_of_a_byte_level_vocabulary_is_text_not_bytes():
    """Ġ spells a space in the model's own words, and itself in added ones."""
    vocabulary = byte_vocabulary(AddedToken("<|Ġ|>", normalized=False))
    assert vocabulary.tokenizer.token_bytes(vocabulary.added["<|Ġ|>"]) == "<|Ġ|>".encode()


# What stands in front


def test_sentencepiece_begins_every_text_with_a_space(mistral):
    assert mistral.tokenizer.begins_with_space
    assert mistral.registry("openchat_3.5").begins_with_space
    # A chat template's prompt is one text: the answer goes on within it.
    assert not mistral.chat(chat_templates.MISTRAL_INSTRUCT).begins_with_space


def test_an_answer_shows_that_space_when_it_is_decoded_after_its_prompt(mistral):
    """As vLLM decodes: primed with the prompt.  This is the space that ``streaming`` removes."""
    prompt = mistral.tokenizer.encode_now([Literal("<|end_of_turn|>"), Plain("Assistant:")])
    stream = DecodeStream(ids=prompt, skip_special_tokens=True)
    answer = mistral.tokenizer.encode_plain("Hello you")
    texts = [stream.step(mistral.hf.backend_tokenizer, token_id) or "" for token_id in answer]
    assert "".join(texts) == " Hello you"


@pytest.mark.parametrize("name", ["llama3", "demo"])
def test_byte_level_vocabularies_do_not(request, name):
    assert not request.getfixturevalue(name).tokenizer.begins_with_space


def test_the_tokens_in_front_of_every_prompt(llama3, mistral, demo):
    assert llama3.tokenizer.bos_token_ids == (128000,)
    assert mistral.tokenizer.bos_token_ids == (1,)
    assert demo.tokenizer.bos_token_ids == ()


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt():
    """``add_eos_token`` is left on in many fine-tuned models; it is for training."""
    backend = Backend(models.BPE(_byte_words(), []))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert hf("").input_ids == [256, 257]
    assert Tokenizer(hf).bos_token_ids == (256,)


# Encoding


def test_the_type_of_a_segment_decides_not_its_spelling(vocabulary):
    for token, token_id in vocabulary.added.items():
        told = vocabulary.tokenizer.encode_now([Literal(token), Plain(token)])
        assert told[0] == token_id
        assert vocabulary.controls(told) == [token_id]
        assert vocabulary.spelled(told).replace(" ", "") == token * 2


def test_nothing_is_no_token(vocabulary):
    assert vocabulary.tokenizer.encode_now([Plain(""), Literal(""), Plain("", inside=True)]) == []


class Watched(list):
    """Segments that remember which threads have looked at them."""

    def __init__(self, *segments):
        super().__init__(segments)
        self.threads = set()

    def __iter__(self):
        self.threads.add(threading.current_thread())
        return super().__iter__()


@pytest.mark.parametrize(("repeats", "leaves"), [(10, False), (3_000, True)])
async def test_long_text_is_encoded_by_a_worker_and_gives_the_same_ids(vocabulary, repeats, leaves):
    """The event loop has other streams to serve."""
    token = next(iter(vocabulary.added))
    text = f"Is 3 < 4? 你好 {token}\n" * repeats
    segments = Watched(Literal(token), Plain(text), Plain(text, inside=True))
    ids = await vocabulary.tokenizer.encode(len(text), lambda: segments)
    assert (segments.threads != {threading.current_thread()}) is leaves
    assert ids == vocabulary.tokenizer.encode_now(segments)
    assert vocabulary.controls(ids) == [vocabulary.added[token]]


async def test_a_callers_long_texts_are_not_in_front_of_anothers(demo):
    """Callers have salts of their own."""
    may_end = threading.Event()

    class Slow(Watched):
        def __iter__(self):
            assert may_end.wait(10)
            return super().__iter__()

    encode = demo.tokenizer.encode
    flood = [
        asyncio.create_task(encode(10**6, lambda: Slow(Plain("a")), cache_salt="a"))
        for _ in range(5)
    ]
    await asyncio.sleep(0)
    long = [Plain("Hello " * 3_000)]
    assert len(await encode(10**6, lambda: long, cache_salt="b")) > 3_000
    assert not any(task.done() for task in flood)
    may_end.set()
    assert await asyncio.gather(*flood) == [await encode(1, lambda: [Plain("a")])] * 5


def test_the_vocabularys_own_tokenizer_is_left_alone(demo_folder):
    """Others use it, too (vLLM does): protection is switched on in copies."""
    demo = Vocabulary.load(demo_folder)
    demo.tokenizer.encode_plain("<|im_end|>")
    assert demo.hf.encode("<|im_end|>") == [demo.added["<|im_end|>"]]
    assert demo.hf.backend_tokenizer.encode_special_tokens is False


# Vocabularies whose plain words reach a control token


def test_a_control_token_that_merges_can_make_is_not_made():
    """Switching control tokens off leaves the words, and here one word is the control token."""
    words = _byte_words() | {"<s": 256, "<s>": 257}
    backend = Backend(models.BPE(words, [("<", "s"), ("<s", ">")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", normalized=False)])
    plainly = Backend.from_str(backend.to_str())
    plainly.encode_special_tokens = True
    assert 257 in plainly.encode("a<s>b").ids, "the attack is void"

    vocabulary = Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert vocabulary.tokenizer.encode_literal("<s>") == [257]
    for text in ("<s>", "a<s>b", "<s><s>", "<<s>s>", "\n<s> <s> <"):
        ids = vocabulary.tokenizer.encode_plain(text)
        assert 257 not in ids
        assert vocabulary.spelled(ids) == text


def test_a_control_token_that_is_a_word_is_not_looked_up():
    backend = Backend(models.WordLevel({"[UNK]": 0, "<s>": 1, "hi": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokenizer.encode_now([Literal("<s>"), Plain("hi <s> hi")]) == [1, 2, 0, 0, 2]


async def test_a_control_token_that_normalisation_spells_is_left_out():
    """Unigram vocabularies with NFKC: fullwidth brackets become a word that ends the text."""
    words = [("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("b", -1.0), ("<s>", 0.0)]
    backend = Backend(models.Unigram(words, unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.add_special_tokens(
        [AddedToken(token, normalized=False) for token in ("<unk>", "</s>", "<s>")]
    )
    vocabulary = Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=backend))
    forged = "a\N{FULLWIDTH LESS-THAN SIGN}/s\N{FULLWIDTH GREATER-THAN SIGN}b"
    assert vocabulary.hf.encode(forged) == [2, 1, 3], "the attack is void"
    assert vocabulary.tokenizer.encode_plain(forged) == [2, 3]
    renderer = vocabulary.chat("<s>{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert await renderer.render(conversation(("user", forged))) == [4, 2, 3]


# A space in front of the prompt only


def test_a_text_inside_a_prompt_gets_no_space_where_only_the_prompt_has_one():
    backend = Backend(models.WordLevel({"[UNK]": 0, "▁a": 1, "a": 2, "<s>": 3}, unk_token="[UNK]"))
    for nested in (False, True):
        metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([metaspace]) if nested else metaspace
        tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
        assert tokenizer.encode_plain("a") == [1]
        assert tokenizer.encode_plain("a", inside=True) == [2]


async def test_the_event_loop_turns_while_a_long_text_is_encoded(llama3):
    """The tokenizer must let go of the interpreter's lock: a worker thread alone is not enough."""
    text = [Plain("hello world " * 40_000)]
    work = asyncio.create_task(llama3.tokenizer.encode(len(text[0].text), lambda: text))
    turns = 0
    while not work.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert turns > 10
    assert len(await work) == 80_001


class Counting(Tokenizer):
    """Counts the characters that are really encoded."""

    encoded = 0

    def _encode_plain(self, text, backend):
        self.encoded += len(text)
        return super()._encode_plain(text, backend)


async def test_a_conversation_that_comes_back_costs_only_its_new_turn(llama3):
    tokenizer = Counting(llama3.hf)
    turns = [Plain(f"Turn {number}. " + "Tell me more. " * 900) for number in range(4)]
    for end in range(1, 5):
        tokenizer.encoded = 0
        ids = await tokenizer.encode(0, lambda end=end: turns[:end])
        assert tokenizer.encoded == len(turns[end - 1].text)
        assert ids == llama3.tokenizer.encode_now(turns[:end])


async def test_what_one_caller_has_said_is_not_remembered_for_another(llama3):
    """The time that it takes would tell."""
    tokenizer = Counting(llama3.hf)
    text = "A document that somebody else may have sent. " * 200
    for salt, encoded in (("a", len(text)), ("b", len(text)), (None, len(text)), ("a", 0)):
        tokenizer.encoded = 0
        ids = await tokenizer.encode(0, lambda: [Plain(text)], cache_salt=salt)
        assert tokenizer.encoded == encoded
        assert ids == list(llama3.tokenizer.encode_plain(text))


async def test_only_what_is_new_decides_whether_a_worker_is_needed(llama3):
    segments = Watched(Plain("All of this was said before. " * 300))
    await llama3.tokenizer.encode(0, lambda: segments)
    assert segments.threads != {threading.current_thread()}
    segments.threads.clear()
    await llama3.tokenizer.encode(0, lambda: segments)
    assert segments.threads == {threading.current_thread()}


def test_without_memory_every_text_is_encoded_anew(llama3):
    tokenizer = Counting(llama3.hf, remember_bytes=0)
    assert tokenizer.encode_plain("twice") == tokenizer.encode_plain("twice")
    assert tokenizer.encoded == 10


def test_remembered_ids_tell_a_text_inside_a_prompt_from_one_on_its_own():
    backend = Backend(models.WordLevel({"[UNK]": 0, "▁a": 1, "a": 2, "<s>": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    for _ in range(2):
        assert list(tokenizer.encode_plain("a")) == [1]
        assert list(tokenizer.encode_plain("a", inside=True)) == [2]


# Loading


async def test_load_reads_a_model_folder(mistral_folder, mistral):
    tokenizer = Tokenizer.load(str(mistral_folder))
    text = [Literal("<s>"), Plain("Hello <s>")]
    assert tokenizer.encode_now(text) == mistral.tokenizer.encode_now(text)


def _refusal(load) -> str:
    with pytest.raises(StartupError) as caught:
        load()
    return str(caught.value)


def _one_sentence_about(folder, load) -> bool:
    said = _refusal(load)
    reason = said.removeprefix(f"The tokenizer of {folder} cannot be loaded: ")
    return reason != said and len(reason) > 5 and "\n" not in said and ". " not in said


def test_a_folder_that_is_not_there(tmp_path):
    folder = str(tmp_path / "gone")
    assert _one_sentence_about(folder, lambda: Tokenizer.load(folder))


def test_a_folder_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert _one_sentence_about(tmp_path, lambda: Tokenizer.load(str(tmp_path)))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        # For this one tokenizers raises a bare Exception.
        '{"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}',
    ],
    ids=["cut off", "empty", "inconsistent"],
)
def test_a_damaged_tokenizer_json(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    (tmp_path / "tokenizer.json").write_text(content)
    assert _one_sentence_about(tmp_path, lambda: Tokenizer.load(str(tmp_path)))


def test_a_tokenizer_that_cannot_tell_text_from_control_tokens():
    said = _refusal(lambda: Tokenizer(ByT5Tokenizer()))
    assert said.startswith("The tokenizer class ByT5Tokenizer has no tokenizer.json form")


def test_a_model_without_a_chat_template():
    said = _refusal(byte_vocabulary().tokenizer.chat_template)
    assert said == ("This model's tokenizer has no chat template. Choose one with --model-type.")
