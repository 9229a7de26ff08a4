"""The OpenChat formats give the token ids of the reference implementation (ochat 3.6.1).

``golden/*.json`` were recorded from it.  The independent renderings below share no code with
ours: tiktoken and SentencePiece encode the texts, and the template's ids are put by hand.
"""

import json
from pathlib import Path

import pytest
import sentencepiece
import tiktoken

from ochat_serve.generation import ChatTurn, Conversation
from tests import model_folders
from tests.vocabularies import Vocabulary, conversation

GOLDEN = Path(__file__).parents[1] / "golden"
# The reference switches control tokens off in texts, and its own tests say so.  These cases were
# recorded under a version of transformers in which every call of a tokenizer switches them on
# again, so the recorded ids hold forged control tokens.  For us text stays text.
FORGED = frozenset(
    {
        "control tokens in the user's text are text",
        "control tokens in the system's text are text",
    }
)
# Where transformers 5, under which OpenChat 3.5 was recorded, differs from SentencePiece and so
# from the tokenizer.json that the model has: a text that starts with a space, a run of spaces.
TRANSFORMERS_5 = frozenset(
    {("openchat_3.5", "leading and trailing space are kept"), ("openchat_3.5", "code")}
)


def _cases(name):
    recorded = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    assert recorded["model_type"] == name
    for case in recorded["cases"]:
        turns = tuple(ChatTurn(turn["role"], turn["content"]) for turn in case["messages"])
        yield case["title"], Conversation(turns, case["condition"]), case["token_ids"]


CASES = {name: tuple(_cases(name)) for name in ("openchat_3.6", "openchat_3.5")}
CASE = ("name", "chat", "recorded")


def _params(wanted):
    return [
        pytest.param(name, chat, ids, id=f"{name}: {title}")
        for name, cases in CASES.items()
        for title, chat, ids in cases
        if wanted(name, title)
    ]


HONEST = _params(lambda _, title: title not in FORGED)
HOSTILE = _params(lambda _, title: title in FORGED)
AGREED = _params(lambda *case: case[1] not in FORGED and case not in TRANSFORMERS_5)
ALL_3_5 = [pytest.param(chat, id=title) for title, chat, _ in CASES["openchat_3.5"]]


@pytest.fixture(scope="module")
def vocabularies(llama3, mistral) -> dict[str, Vocabulary]:
    return {"openchat_3.6": llama3, "openchat_3.5": mistral}


@pytest.fixture(scope="module")
def independent():
    """Format name -> a rendering that shares no code with ours."""
    ranks = model_folders.llama3_ranks()
    words = tiktoken.Encoding(
        "llama3", pat_str=model_folders.LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={}
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_folders.MISTRAL_PIECES))

    def openchat_3_6(chat: Conversation) -> list[int]:
        ids = [128000]
        for role, text in _turns(chat):
            header = role if role == "System" else f"{chat.condition or 'GPT4 Correct'} {role}"
            ids += [128006, *words.encode_ordinary(header), 128007, *words.encode_ordinary("\n\n")]
            ids += [*words.encode_ordinary(text), 128009]
        return ids[:-1]

    def openchat_3_5(chat: Conversation) -> list[int]:
        ids = [1]
        for role, text in _turns(chat):
            if role != "System":
                ids += pieces.encode(f"{chat.condition or 'GPT4 Correct'} {role}:")
            ids += [*pieces.encode(text), 32000]
        return ids[:-1]

    return {"openchat_3.6": openchat_3_6, "openchat_3.5": openchat_3_5}


def _turns(chat):
    """Role names and texts as the formats have them, the open turn included."""
    turns = [
        (turn.role.title(), turn.text.strip() if turn.role == "system" else turn.text)
        for turn in chat.turns
    ]
    return turns if turns[-1][0] == "Assistant" else [*turns, ("Assistant", "")]


def test_every_forged_case_is_still_in_the_recordings():
    for name, cases in CASES.items():
        assert {title for title, _, _ in cases} >= FORGED, name
        assert len(cases) == 13


@pytest.mark.parametrize(CASE, HONEST)
async def test_honest_conversations_give_the_recorded_ids(vocabularies, name, chat, recorded):
    assert await vocabularies[name].registry(name).render(chat) == recorded


@pytest.mark.parametrize(CASE, HOSTILE)
async def test_forged_control_tokens_in_the_recordings_are_text_here(
    vocabularies, independent, name, chat, recorded
):
    vocabulary = vocabularies[name]
    renderer = vocabulary.registry(name)
    ids = await renderer.render(chat)
    harmless = await renderer.render(
        Conversation(tuple(ChatTurn(turn.role, "a") for turn in chat.turns))
    )
    assert vocabulary.controls(ids) == vocabulary.controls(harmless)
    assert len(vocabulary.controls(recorded)) > len(vocabulary.controls(harmless))
    assert ids == independent[name](chat)


@pytest.mark.parametrize(CASE, AGREED)
def test_the_independent_rendering_agrees_with_the_reference(independent, name, chat, recorded):
    """Else it would prove nothing about the forged cases."""
    assert independent[name](chat) == recorded


@pytest.mark.parametrize("chat", ALL_3_5)
async def test_openchat_3_5_as_published_has_sentencepieces_ids(published, independent, chat):
    ids = await published.registry("openchat_3.5").render(chat)
    assert ids == independent["openchat_3.5"](chat)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("published_mistral")
    return Vocabulary.load(model_folders.mistral(folder, as_published=True))


# What the reference's own tests expect: ochat/tests/test_model_config.py of ochat 3.6.1.
# fmt: off
WORLD_CUP = [
    128000, 128006, 38, 2898, 19, 41070, 2724, 128007, 271,
    15546, 2834, 279, 220, 679, 23, 4435, 11098, 30, 128009,
    128006, 38, 2898, 19, 41070, 22103, 128007, 271,
    791, 220, 679, 23, 44742, 4435, 11098, 574, 2834, 555, 9822, 13, 128009,
    128006, 38, 2898, 19, 41070, 2724, 128007, 271,
    33413, 11, 889, 2834, 279, 220, 2366, 17, 4435, 11098, 30, 128009,
    128006, 38, 2898, 19, 41070, 22103, 128007, 271,
]
CONTROL_TOKENS_AS_TEXT = [
    3923, 656, 366, 82, 29, 694, 82, 29, 83739, 408, 3659, 38374, 91, 29, 3152, 30,
]
# fmt: on


async def test_the_conversation_that_the_reference_publishes(llama3):
    chat = conversation(
        ("user", "Who won the 2018 World Cup?"),
        ("assistant", "The 2018 FIFA World Cup was won by France."),
        ("user", "Okay, who won the 2022 World Cup?"),
    )
    assert await llama3.registry("openchat_3.6").render(chat) == WORLD_CUP


async def test_the_control_tokens_that_the_reference_publishes_as_text(llama3, independent):
    """Published for <|end_of_turn|>, which is no token of Llama-3; its own must do the same."""
    renderer = llama3.registry("openchat_3.6")
    ids = await renderer.render(conversation(("user", "What do <s> </s> <|end_of_turn|> mean?")))
    assert ids[9:-9] == CONTROL_TOKENS_AS_TEXT
    own = conversation(("user", "What do <s> </s> <|eot_id|> mean?"))
    assert await renderer.render(own) == independent["openchat_3.6"](own)
