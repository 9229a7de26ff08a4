"""``/v1/completions`` on the real demo model, by its wire and through the clients people use."""

import json
import os
import subprocess
import sys
from typing import Any

import httpx
import openai
import pytest
from langchain_openai import OpenAI as LangChain
from openai import AsyncOpenAI, OpenAI

from tests.live import RawClient, eventually
from tests.real_model.conftest import Demo

PATH = "/v1/completions"
FRANCE = "The capital of France is"
PRIMES = "The first prime numbers are 2, 3, 5,"
TIMEOUT_S = 120


def complete(demo: Demo, prompt: object, **fields: object) -> dict[str, Any]:
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 12, **fields}
    answer = httpx.post(demo.url + PATH, json=body, timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(demo: Demo, prompt: object, **fields: object) -> list[dict[str, Any]]:
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 12, "stream": True, **fields}
    answer = httpx.post(demo.url + PATH, json=body, timeout=TIMEOUT_S)
    *events, done = [line[6:] for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


def text(answer: dict[str, Any], index: int = 0) -> str:
    return answer["choices"][index]["text"]


def test_it_goes_on_from_a_text(demo: Demo) -> None:
    answer = complete(demo, FRANCE)
    assert text(answer).startswith(" Paris")
    assert answer["choices"][0]["finish_reason"] == "length"
    ids = httpx.post(demo.url + "/tokenize", json={"prompt": FRANCE}).json()["tokens"]
    assert answer["usage"]["prompt_tokens"] == len(ids) == 5, "no template"
    assert answer["usage"]["completion_tokens"] == 12
    assert text(complete(demo, ids)) == text(answer)
    echoed = complete(demo, ids, echo=True)
    assert text(echoed) == FRANCE + text(answer)


def test_a_templated_prompt_as_ids_is_a_chat(demo: Demo) -> None:
    """With control ids, which stop it, too."""
    said = [{"role": "user", "content": "What is the capital of France?"}]
    ids = httpx.post(demo.url + "/tokenize", json={"messages": said}).json()["tokens"]
    answer = complete(demo, ids)
    assert text(answer) == "The capital of France is Paris."
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2, "echo": True},
        {"stop": [","]},
        {"logprobs": 3},
        {"logprobs": 0, "max_tokens": 1},
        {"n": 2, "temperature": 1, "seed": 3, "logprobs": 1},
    ],
)
def test_stream_equals_one_body_for_several_prompts(demo: Demo, fields: dict[str, Any]) -> None:
    prompts = [FRANCE, PRIMES, "你好 👩‍🚀"]
    whole = complete(demo, prompts, **fields)
    chunks = streamed(demo, prompts, **fields, stream_options={"include_usage": True})
    n = fields.get("n", 1)
    assert [choice["index"] for choice in whole["choices"]] == list(range(3 * n))
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        if "seed" not in fields:  # in a batch, best effort
            assert "".join(part["text"] for part in parts) == choice["text"]
        reasons = [part["finish_reason"] for part in parts if part["finish_reason"]]
        assert len(reasons) == 1
        for made in (choice["text"], "".join(part["text"] for part in parts)):
            assert "\ufffd" not in made
    counts = ("prompt_tokens", "completion_tokens")
    if "seed" not in fields:
        assert [chunks[-1]["usage"][name] for name in counts] == [
            whole["usage"][name] for name in counts
        ]
    assert text(whole).startswith(FRANCE if fields.get("echo") else "")


def test_prompts_of_one_request_are_as_each_alone(demo: Demo) -> None:
    together = complete(demo, [FRANCE, PRIMES])
    assert [text(together, place) for place in range(2)] == [
        text(complete(demo, prompt)) for prompt in (FRANCE, PRIMES)
    ]


@pytest.mark.parametrize("prompt", [PRIMES, "Emoji: 👩‍🚀 🌍"])
def test_offsets_and_logprobs_tell_the_text(demo: Demo, prompt: str) -> None:
    choice = complete(demo, prompt, logprobs=5, max_tokens=20)["choices"][0]
    told = choice["logprobs"]
    assert len({len(values) for values in told.values()}) == 1
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][offset:].startswith(token)
    for token, logprob, top in zip(
        told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True
    ):
        assert top[token] == logprob == max(top.values()), "greedy"
        assert len(top) == 5


def test_cached_tokens_are_counted_for_every_prompt(demo: Demo) -> None:
    prompts = [f"{place} is a number. " * 60 for place in range(2)]
    complete(demo, prompts)
    details = complete(demo, prompts)["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] >= 2 * 128


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_every_prompt(demo: Demo, stream: bool) -> None:
    with RawClient(demo.server.port) as client:
        body = {"prompt": [FRANCE, PRIMES], "max_tokens": 1500, "ignore_eos": True, "n": 2}
        client.post(PATH, json.dumps({**body, "stream": stream}).encode())
        assert eventually(lambda: demo.unfinished() >= 2)
    assert eventually(lambda: demo.unfinished() == 0, within_s=5)
    assert eventually(demo.holds_no_blocks)


@pytest.fixture
def client(demo: Demo) -> OpenAI:
    with OpenAI(base_url=demo.url + "/v1", api_key="x", timeout=TIMEOUT_S) as made:
        yield made


def test_openai(client: OpenAI) -> None:
    ask = {"model": "demo", "prompt": FRANCE, "temperature": 0, "max_tokens": 12}
    answer = client.completions.create(**ask, logprobs=2)
    assert answer.choices[0].text.startswith(" Paris")
    assert answer.choices[0].logprobs.tokens[0] == " Paris"
    assert answer.usage.total_tokens == 17
    stream = client.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == answer.choices[0].text
    assert chunks[-1].usage.completion_tokens == 12


async def test_openai_async(demo: Demo) -> None:
    async with AsyncOpenAI(base_url=demo.url + "/v1", api_key="x", timeout=TIMEOUT_S) as client:
        stream = await client.completions.create(
            model="demo", prompt=[FRANCE, PRIMES], temperature=0, stream=True
        )
        texts = {0: "", 1: ""}
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    assert texts[0].startswith(" Paris")
    assert texts[1]


@pytest.mark.parametrize(
    ("fields", "error", "code"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found"),
        ({"suffix": "x"}, openai.BadRequestError, "unsupported_parameter"),
        ({"logprobs": 6}, openai.BadRequestError, "invalid_value"),
        ({"prompt": [10**6]}, openai.BadRequestError, "invalid_value"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_openai_errors(
    client: OpenAI, fields: dict, error: type[openai.APIStatusError], code: str, stream: bool
) -> None:
    with pytest.raises(error) as caught:
        client.completions.create(**{"model": "demo", "prompt": FRANCE, "stream": stream, **fields})
    assert caught.value.code == code


def test_langchain(demo: Demo) -> None:
    model = LangChain(
        base_url=demo.url + "/v1", api_key="x", model="demo", temperature=0, max_tokens=12,
        timeout=TIMEOUT_S,
    )  # fmt: skip
    assert model.invoke(FRANCE).startswith(" Paris")
    assert "".join(model.stream(FRANCE)) == model.invoke(FRANCE)
    several = model.generate([FRANCE, PRIMES])
    assert len(several.generations) == 2


def test_litellm(demo: Demo) -> None:
    """In a process of its own: litellm's import warns in ways that are not ours to fix."""
    program = (
        "import litellm\n"
        f"ask = dict(model='text-completion-openai/demo', api_base={demo.url + '/v1'!r}, "
        f"api_key='x', prompt={FRANCE!r}, temperature=0, max_tokens=12)\n"
        "print(repr(litellm.text_completion(**ask).choices[0].text))\n"
        "parts = litellm.text_completion(stream=True, **ask)\n"
        "print(repr(''.join(part.choices[0].text or '' for part in parts)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, timeout=TIMEOUT_S,
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )  # fmt: skip
    expected = repr(text(complete(demo, FRANCE)))
    assert done.stdout.splitlines() == [expected, expected], done.stderr[-2000:]
