"""Model folders without weights, made from packages: what Hugging Face would have given.

The vocabularies are the real ones, so token ids here are the ids of the real models.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode


def _package(name: str) -> Path:
    """Where a package lies; importing it would take seconds."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


LLAMA3_RANKS = _package("llama_models") / "llama3" / "tokenizer.model"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MISTRAL_PIECES = _package("mistral_common") / "data" / "tokenizer.model.v1"

# Written by these, the files need none of transformers 5's repairs for its own mistakes.
_MADE_BY = "4.40.0"


def llama3(
    folder: Path,
    *,
    chat_template: str | None = None,
    openchat: Mapping[str, Any] | None = None,
) -> Path:
    """Llama-3-8B's shape and vocabulary; OpenChat 3.6's, unless ``openchat`` says another."""
    byte_chars = bytes_to_unicode()
    ranks = {
        "".join(byte_chars[byte] for byte in token): rank for token, rank in llama3_ranks().items()
    }
    tokenizer = Tokenizer(models.BPE(ranks, _merges(ranks, ranks), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_special(token) for token in _llama3_specials()])
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _in_front("<|begin_of_text|>", 128000)]
    )
    return _write(
        folder,
        tokenizer,
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "model_max_length": 8192,
            "clean_up_tokenization_spaces": True,
            **({"chat_template": chat_template} if chat_template else {}),
        },
        config={
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-05,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "transformers_version": _MADE_BY,
        },
        generation_config={"bos_token_id": 128000, "eos_token_id": [128001, 128009]},
        openchat={"model_type": "openchat_3.6"} if openchat is None else openchat,
    )


def mistral(
    folder: Path,
    *,
    as_published: bool = False,
    legacy: bool = True,
    more_tokens: Sequence[str] = (),
    chat_template: str | None = None,
    openchat: Mapping[str, Any] | None = None,
) -> Path:
    """Mistral-7B's vocabulary with OpenChat 3.5's end of turn, and a toy's shape.

    The files are what transformers 5 makes of SentencePiece's: with ``legacy`` a space goes in
    front of every text that does not start with one, without it only in front of the prompt.
    ``as_published`` they are what transformers 4 wrote and the models' repositories hold: the
    space goes in front of every text, and the ids are SentencePiece's to the last one.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(MISTRAL_PIECES))
    vocab = {pieces.id_to_piece(piece): piece for piece in range(pieces.vocab_size())}
    # Runs of spaces have small ids and the worst scores; transformers 5 looks at ids.
    order = {piece: -pieces.get_score(place) for piece, place in vocab.items()}
    merges = _merges(vocab, order if as_published else vocab)
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if as_published:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="always" if legacy else "first", split=False
        )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    specials = ("<unk>", "<s>", "</s>", "<|end_of_turn|>", *more_tokens)
    tokenizer.add_special_tokens([_special(token) for token in specials])
    tokenizer.post_processor = _in_front("<s>", 1)
    return _write(
        folder,
        tokenizer,
        tokenizer_config={
            "tokenizer_class": "LlamaTokenizer",
            "legacy": legacy,
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "<|end_of_turn|>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            **({"chat_template": chat_template} if chat_template else {}),
        },
        config={
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": tokenizer.get_vocab_size(),
            "max_position_embeddings": 8192,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-05,
            "hidden_act": "silu",
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "transformers_version": _MADE_BY,
        },
        generation_config={"bos_token_id": 1, "eos_token_id": 32000},
        openchat={"model_type": "openchat_3.5"} if openchat is None else openchat,
    )


def llama3_ranks() -> dict[bytes, int]:
    """Llama-3's plain tokens: bytes to id, 128,000 of them."""
    lines = (line.split() for line in LLAMA3_RANKS.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _llama3_specials() -> list[str]:
    """Llama-3's 256 special tokens, 128000 to 128255 in order."""
    named = {
        0: "begin_of_text",
        1: "end_of_text",
        6: "start_header_id",
        7: "end_header_id",
        9: "eot_id",
    }
    reserved = (f"reserved_special_token_{number}" for number in range(251))
    return [f"<|{named.get(place) or next(reserved)}|>" for place in range(256)]


def _merges(vocab: Mapping[str, int], order: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, in the tokens' ``order``: how a vocabulary that
    is only a ranked list (tiktoken's, SentencePiece's) is written as merges."""
    merges = []
    for token in vocab:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                merges.append((order[token], vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def _in_front(token: str, token_id: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B:1"], special_tokens=[(token, token_id)]
    )


def _write(folder: Path, tokenizer: Tokenizer, **files: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return folder
