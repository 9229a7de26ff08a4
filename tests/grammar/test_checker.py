"""What is known is not tried again, and whose turn it is."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import pytest

from ochat_serve.errors import InvalidRequest, Unavailable
from ochat_serve.generation import ANY_OBJECT, Constraint
from ochat_serve.grammar import TriedGrammars, checker
from ochat_serve.grammar.trial import TrialLost
from tests.live import eventually


@dataclass
class ScriptedTrial:
    """``verdicts`` by text; with ``held``, each trial waits until it is released."""

    verdicts: dict[str, str | Exception] = field(default_factory=dict)
    tried: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    held: threading.Semaphore | None = None
    closed: bool = False

    def verdict(self, kind: str, text: str, patterns: Sequence[str] = ()) -> str:
        self.tried.append(text)
        self.patterns += patterns
        if self.held is not None:
            assert self.held.acquire(timeout=10)
        verdict = self.verdicts.get(text, "")
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    def kill(self) -> None:
        if self.held is not None:
            self.held.release(100)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def trial() -> ScriptedTrial:
    return ScriptedTrial()


@pytest.fixture
async def grammars(trial: ScriptedTrial) -> AsyncIterator[TriedGrammars]:
    made = TriedGrammars(trial)
    yield made
    await made.close()
    assert trial.closed


def regex(text: str) -> Constraint:
    return Constraint("regex", text, param="structured_outputs.regex", subject="regex")


def json_schema(text: str) -> Constraint:
    return Constraint("json", text, param="response_format", subject="schema for 'x'")


async def until(condition) -> None:
    assert await asyncio.to_thread(eventually, condition)


async def test_a_good_one_is_tried_once(trial: ScriptedTrial, grammars: TriedGrammars) -> None:
    for caller in ("a", "b", None):
        await grammars.checked(regex("x"), caller)
    assert trial.tried == ["x"]


async def test_a_bad_one_is_tried_once_and_told_in_the_words_of_each_request(
    trial: ScriptedTrial, grammars: TriedGrammars
) -> None:
    trial.verdicts["x"] = "it is bad."
    for param in ("one", "two"):
        with pytest.raises(InvalidRequest) as refusal:
            await grammars.checked(Constraint("regex", "x", param=param, subject="thing"), None)
        assert refusal.value.message == "Invalid thing: it is bad."
        assert (refusal.value.param, refusal.value.code) == (param, "invalid_value")
    assert trial.tried == ["x"]


async def test_json_mode_is_not_tried(trial: ScriptedTrial, grammars: TriedGrammars) -> None:
    assert await grammars.checked(json_schema(ANY_OBJECT), None) == json_schema(ANY_OBJECT)
    assert trial.tried == []


async def test_the_same_text_of_another_kind_is_another(
    trial: ScriptedTrial, grammars: TriedGrammars
) -> None:
    await grammars.checked(regex("{}"), None)
    await grammars.checked(json_schema("{}"), None)
    assert trial.tried == ["{}", "{}"]


async def test_the_one_that_was_not_used_for_longest_is_forgotten(
    trial: ScriptedTrial, grammars: TriedGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checker, "MAX_KNOWN", 2)
    for text in ("a", "b", "a", "c", "a", "b"):
        await grammars.checked(regex(text), None)
    assert trial.tried == ["a", "b", "c", "b"]


async def test_a_schema_is_looked_at_before_it_is_tried(
    trial: ScriptedTrial, grammars: TriedGrammars
) -> None:
    with pytest.raises(InvalidRequest, match=r"^Invalid schema for 'x': In context=\(\), 'not' "):
        await grammars.checked(json_schema('{"not":{}}'), None)
    assert trial.tried == []
    await grammars.checked(json_schema('{"type":"string","pattern":"a+"}'), None)
    assert trial.patterns == ["a+"]


async def test_a_schema_that_was_changed_reaches_the_engine_as_it_was_tried(
    trial: ScriptedTrial, grammars: TriedGrammars
) -> None:
    asked = json_schema('{"type":"string","maxLength":2}')
    for _ in range(2):
        given = await grammars.checked(asked, None)
        assert given.text == trial.tried[0] != asked.text
        assert (given.kind, given.param, given.subject) == ("json", asked.param, asked.subject)
    assert len(trial.tried) == 1
    same = json_schema('{"type":"string"}')
    assert await grammars.checked(same, None) is same


async def test_changed_schemas_are_bounded_by_their_length(
    trial: ScriptedTrial, grammars: TriedGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checker, "MAX_KNOWN_CHARS", 120)
    for number in range(20):
        await grammars.checked(json_schema(f'{{"type":"string","maxLength":{number}}}'), None)
    assert 1 <= len(grammars._known) <= 3
    assert grammars._known_chars == sum(len(known.text) for known in grammars._known.values())


async def test_what_could_not_be_found_out_is_not_remembered(
    trial: ScriptedTrial, grammars: TriedGrammars
) -> None:
    trial.verdicts["x"] = TrialLost()
    with pytest.raises(Unavailable) as refusal:
        await grammars.checked(regex("x"), None)
    assert refusal.value.code == "grammar_unavailable"
    assert refusal.value.retry_after_s
    trial.verdicts.clear()
    await grammars.checked(regex("x"), None)
    assert trial.tried == ["x", "x"]


async def test_two_that_ask_for_the_same_wait_for_one_trial(
    trial: ScriptedTrial, grammars: TriedGrammars
) -> None:
    trial.held = threading.Semaphore(0)
    asking = [asyncio.create_task(grammars.checked(regex("x"), key)) for key in "ab"]
    await until(lambda: trial.tried)
    trial.held.release(10)
    await asyncio.gather(*asking)
    assert trial.tried == ["x"]


async def test_a_flood_by_one_key_has_one_turn_at_a_time(
    trial: ScriptedTrial, grammars: TriedGrammars
) -> None:
    """Whoever comes later waits for the flood's one trial, not for all of them."""
    trial.held = threading.Semaphore(0)
    flood = [asyncio.create_task(grammars.checked(regex(f"f{n}"), "flood")) for n in range(5)]
    await until(lambda: trial.tried)
    other = asyncio.create_task(grammars.checked(regex("other"), "other"))
    await asyncio.sleep(0)
    trial.held.release(1)
    await until(lambda: len(trial.tried) == 2)
    assert trial.tried == ["f0", "other"]
    trial.held.release(100)
    await asyncio.gather(*flood, other)


async def test_only_so_many_wait(
    trial: ScriptedTrial, grammars: TriedGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checker, "MAX_WAITING_OF_KEY", 2)
    monkeypatch.setattr(checker, "MAX_WAITING", 3)
    trial.held = threading.Semaphore(0)
    waiting = [asyncio.create_task(grammars.checked(regex(f"{n}"), "a")) for n in range(2)]
    await until(lambda: trial.tried)
    with pytest.raises(Unavailable) as refusal:
        await grammars.checked(regex("2"), "a")
    assert (refusal.value.status, refusal.value.code) == (503, "overloaded")
    waiting.append(asyncio.create_task(grammars.checked(regex("3"), "b")))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await grammars.checked(regex("4"), "c")
    trial.held.release(100)
    await asyncio.gather(*waiting)
    await grammars.checked(regex("5"), "a")


async def test_who_gives_up_leaves_the_queue(trial: ScriptedTrial, grammars: TriedGrammars) -> None:
    trial.held = threading.Semaphore(0)
    first, second = (asyncio.create_task(grammars.checked(regex(t), "a")) for t in "xy")
    await until(lambda: trial.tried)
    second.cancel()
    first.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    assert not grammars._waiting
    trial.held.release(100)
    await grammars.checked(regex("z"), "a")
    assert trial.tried == ["x", "z"]


async def test_it_closes_while_one_is_tried(trial: ScriptedTrial) -> None:
    grammars = TriedGrammars(trial)
    trial.held = threading.Semaphore(0)
    asking = asyncio.create_task(grammars.checked(regex("x"), None))
    await until(lambda: trial.tried)
    await grammars.close()
    await asking
    assert trial.closed
