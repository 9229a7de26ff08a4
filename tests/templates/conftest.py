"""More vocabularies than the other tests need."""

import pytest

from tests import model_folders
from tests.vocabularies import Vocabulary, with_more_tokens


@pytest.fixture(scope="session")
def gemma(tmp_path_factory) -> Vocabulary:
    """Gemma's control tokens.  Its words lie in no package; Mistral's stand in for them."""
    folder = tmp_path_factory.mktemp("gemma")
    tokens = ("<start_of_turn>", "<end_of_turn>")
    return Vocabulary.load(model_folders.mistral(folder, more_tokens=tokens))


@pytest.fixture(scope="session")
def newer_mistral(tmp_path_factory) -> Vocabulary:
    """One whose dummy prefix stands at the start of a prompt only, not after control tokens."""
    return Vocabulary.load(model_folders.mistral(tmp_path_factory.mktemp("newer"), legacy=False))


@pytest.fixture(scope="session")
def thinking(demo_folder) -> Vocabulary:
    return with_more_tokens(demo_folder, ["<think>", "</think>"])
