"""Two keys never share a cached block of the real engine's; one key does."""

import json

from ochat_serve.caller import Caller
from ochat_serve.protocol.chat import ChatCompletionRequest
from ochat_serve.request_log import RequestRecord
from tests.real_model.conftest import Demo

LONG = {"role": "user", "content": "Remember this secret: " + "red sky, blue sea. " * 40}
BODY = json.dumps({"messages": [LONG], "max_tokens": 2})


def cached_tokens(demo: Demo, key: str | None) -> int:
    """Of the long prompt, asked by the holder of a key."""

    async def ask() -> bytes:
        record = RequestRecord(0, "r", "POST", "/v1/chat/completions")
        request = ChatCompletionRequest.model_validate_json(BODY)
        chat = await demo.serving.require_chat().prepare(request, record, Caller(key))
        return await chat.body()

    usage = json.loads(demo.server.call(ask()))["usage"]
    assert usage["prompt_tokens"] > 200
    return usage["prompt_tokens_details"]["cached_tokens"]


def test_a_cached_prompt_serves_its_own_key_only(demo: Demo) -> None:
    assert cached_tokens(demo, "one") == 0
    assert cached_tokens(demo, "two") == 0
    assert cached_tokens(demo, None) == 0
    for key in ("one", "two", None):
        assert cached_tokens(demo, key) > 100
