"""What many tests share: real vocabularies, made or loaded once per session."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test needs the hub

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # importing transformers takes seconds, and most tests need no tokenizer
    from tests.redis_server import RedisServer
    from tests.vocabularies import Vocabulary


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory) -> Iterator[Path]:
    """Where servers with keys keep usage, those in processes of their own too: never at home."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def llama3_folder(tmp_path_factory) -> Path:
    from tests import model_folders

    return model_folders.llama3(tmp_path_factory.mktemp("llama3"))


@pytest.fixture(scope="session")
def mistral_folder(tmp_path_factory) -> Path:
    from tests import model_folders

    return model_folders.mistral(tmp_path_factory.mktemp("mistral"))


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    from ochat_serve import demo_model

    return demo_model.ensure()


@pytest.fixture(scope="session")
def llama3(llama3_folder) -> "Vocabulary":
    from tests.vocabularies import Vocabulary

    return Vocabulary.load(llama3_folder)


@pytest.fixture(scope="session")
def mistral(mistral_folder) -> "Vocabulary":
    from tests.vocabularies import Vocabulary

    return Vocabulary.load(mistral_folder)


@pytest.fixture(scope="session")
def demo(demo_folder) -> "Vocabulary":
    from tests.vocabularies import Vocabulary

    return Vocabulary.load(demo_folder)


@pytest.fixture(scope="session")
def _redis_for_all(tmp_path_factory) -> "Iterator[RedisServer]":
    from tests.redis_server import RedisServer

    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_url(_redis_for_all: "RedisServer") -> str:
    """A Redis that runs and is empty."""
    _redis_for_all.client.flushall()
    return _redis_for_all.url


@pytest.fixture
def redis_server(tmp_path: Path) -> "Iterator[RedisServer]":
    """A Redis of the test's own, to kill and to stop."""
    from tests.redis_server import RedisServer

    with RedisServer(tmp_path) as server:
        yield server
