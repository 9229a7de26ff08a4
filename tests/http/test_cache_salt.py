"""What was computed for one key's prompts is not used for another's: the server sees to it."""

import re

import httpx

from ochat_serve.app import create_app
from ochat_serve.chat_service import cache_salt
from ochat_serve.settings import Settings
from tests.fakes import ScriptedEngine, WordPrompts, serving
from tests.live import live

CHAT = "/v1/chat/completions"
KEYS = ("sk-first", "sk-second")
ASK = {"messages": [{"role": "user", "content": "x"}]}


def salts(settings: Settings, *requests: tuple[str, dict[str, object]]) -> list[str | None]:
    """What the engine was given for (key, further fields)."""
    engine = ScriptedEngine()
    with live(create_app(settings, serving(engine, settings))) as server:
        for key, fields in requests:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            answer = httpx.post(server.url + CHAT, headers=headers, json={**ASK, **fields})
            assert answer.status_code == 200
            assert ("cache_salt" in answer.headers.get("x-ochat-ignored", "")) is bool(fields)
    return engine.cache_salts


def test_each_key_has_one_salt_and_does_not_choose_it() -> None:
    settings = Settings(api_keys=KEYS)
    others = cache_salt(b"secret", "key-2")
    first, again, wants_other, second = salts(
        settings,
        (KEYS[0], {}),
        (KEYS[0], {"stream": False, "cache_salt": "x"}),
        (KEYS[0], {"cache_salt": others}),
        (KEYS[1], {}),
    )
    assert first == again == wants_other
    assert second == others
    assert first != second


def test_without_keys_all_are_one() -> None:
    assert salts(Settings(), ("", {}), ("", {"cache_salt": "x"})) == [None, None]


def test_a_salt_tells_neither_key_nor_secret() -> None:
    salt = cache_salt(b"secret", "key-1")
    assert re.fullmatch("[0-9a-f]{64}", salt or "")
    assert salt != cache_salt(b"other secret", "key-1")
    assert cache_salt(b"secret", "Schl\N{LATIN SMALL LETTER U WITH DIAERESIS}ssel")


def test_prompts_are_remembered_by_the_same_salt() -> None:
    seen: list[str | None] = []

    class Prompts(WordPrompts):
        async def render(self, conversation, max_tokens=None, cache_salt=None):  # type: ignore[override]
            seen.append(cache_salt)
            return [1]

    engine = ScriptedEngine()
    settings = Settings(api_keys=KEYS)
    with live(create_app(settings, serving(engine, settings, Prompts()))) as server:
        for key in KEYS:
            headers = {"authorization": f"Bearer {key}"}
            httpx.post(server.url + CHAT, headers=headers, json=ASK).raise_for_status()
    assert seen == engine.cache_salts == [cache_salt(b"secret", f"key-{n}") for n in (1, 2)]
