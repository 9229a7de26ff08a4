"""Incremental decoding starts from the end of a prompt: it gives the same text."""

import random

import pytest
from tokenizers.decoders import DecodeStream

from ochat_serve.detokenizing import decode_stream
from tests.vocabularies import Vocabulary


def text_of(stream: DecodeStream, vocabulary: Vocabulary, ids: list[int]) -> str:
    backend = vocabulary.hf.backend_tokenizer
    return "".join(stream.step(backend, token_id) or "" for token_id in ids)


@pytest.mark.parametrize("name", ["llama3", "mistral"])
@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_the_end_of_a_prompt_is_enough(
    name: str, skip_special_tokens: bool, request: pytest.FixtureRequest
) -> None:
    vocabulary: Vocabulary = request.getfixturevalue(name)
    rng = random.Random(0)
    words = ["Hello", " there", "\N{CROISSANT}", "中文", "\n\n", " ", "3.50 €", "naïve", ""]
    for _ in range(60):
        said = "".join(rng.choices(words, k=rng.randrange(60)))
        answer = "".join(rng.choices(words, k=12))
        prompt = [
            *vocabulary.tokenizer.encode_literal("<s>" if name == "mistral" else "<|eot_id|>"),
            *vocabulary.tokenizer.encode_plain(said),
        ]
        # Where the answer begins says nothing of words; but a prompt ends with a whole character.
        ids = [*prompt, *vocabulary.tokenizer.encode_plain(answer)]
        cut = rng.randrange(max(1, len(prompt) - 2), len(ids) + 1)
        while vocabulary.hf.decode(ids[:cut]).endswith("\ufffd"):
            cut += 1
        whole = DecodeStream(ids=ids[:cut], skip_special_tokens=skip_special_tokens)
        ours = decode_stream(ids[:cut], skip_special_tokens)
        expected = text_of(whole, vocabulary, ids[cut:])
        assert text_of(ours, vocabulary, ids[cut:]) == expected


def test_without_a_prompt() -> None:
    assert isinstance(decode_stream(skip_special_tokens=True), DecodeStream)
