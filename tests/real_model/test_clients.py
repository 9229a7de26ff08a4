"""The clients people use, talking to the real demo model: no wire is faked here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI

from tests.real_model.conftest import Demo

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."
TIMEOUT_S = 120


@pytest.fixture
def client(demo: Demo) -> OpenAI:
    with OpenAI(base_url=demo.url + "/v1", api_key="x", timeout=TIMEOUT_S) as made:
        yield made


def test_openai_plain(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=FRANCE, temperature=0)
    assert answer.choices[0].message.content == PARIS
    assert answer.usage.total_tokens == 45
    assert answer._request_id.startswith("req-")


def test_openai_streamed(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo",
        messages=FRANCE,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == PARIS
    assert chunks[-1].usage.completion_tokens == 8


def test_openai_stream_helper(client: OpenAI) -> None:
    with client.chat.completions.stream(model="demo", messages=FRANCE, temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    assert kinds[-1] in ("content.done", "chunk")
    assert final.choices[0].message.content == PARIS


def test_openai_raw_response(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="demo", messages=FRANCE, temperature=0, extra_body={"colour": "blue"}
    )
    assert raw.headers["x-ochat-ignored"] == "colour"
    assert raw.parse().choices[0].message.content == PARIS


def test_openai_streaming_response(client: OpenAI) -> None:
    with client.chat.completions.with_streaming_response.create(
        model="demo", messages=FRANCE, temperature=0
    ) as response:
        assert json.loads(response.read())["choices"][0]["message"]["content"] == PARIS


async def test_openai_async(demo: Demo) -> None:
    async with AsyncOpenAI(base_url=demo.url + "/v1", api_key="x", timeout=TIMEOUT_S) as client:
        answer = await client.chat.completions.create(model="demo", messages=FRANCE, temperature=0)
        assert answer.choices[0].message.content == PARIS
        stream = await client.chat.completions.create(
            model="demo", messages=FRANCE, temperature=0, stream=True
        )
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(texts) == PARIS


def test_openai_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo", "SmolLM2-135M-Instruct"]
    assert client.models.retrieve("SmolLM2-135M-Instruct").owned_by == "ochat_serve"


@pytest.mark.parametrize(
    ("fields", "error", "code"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_value"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "unsupported_parameter"),
        ({"extra_body": {"logit_bias": {"x": 1}}}, openai.BadRequestError, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_openai_errors(
    client: OpenAI, fields: dict, error: type[openai.APIStatusError], code: str, stream: bool
) -> None:
    arguments = {"model": "demo", "messages": FRANCE, "stream": stream, **fields}
    with pytest.raises(error) as caught:
        client.chat.completions.create(**arguments)
    assert caught.value.code == code
    assert caught.value.param


def test_curl(demo: Demo) -> None:
    """The README's line, at this port."""
    command = [
        "curl", "-sS", f"{demo.url}/v1/chat/completions",
        "-H", "Content-Type: application/json",
        "-d", json.dumps({"messages": FRANCE, "temperature": 0}),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, check=True, timeout=TIMEOUT_S)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == PARIS


def test_langchain(demo: Demo) -> None:
    model = ChatOpenAI(
        base_url=demo.url + "/v1", api_key="x", model="demo", temperature=0, timeout=TIMEOUT_S
    )
    answer = model.invoke([("system", "You are helpful."), ("human", FRANCE[0]["content"])])
    assert "Paris" in answer.content
    assert answer.usage_metadata["output_tokens"] > 0
    assert "Paris" in "".join(chunk.content for chunk in model.stream(FRANCE))


def test_litellm(demo: Demo) -> None:
    """In a process of its own: litellm's import warns in ways that are not ours to fix."""
    program = (
        "import sys, litellm\n"
        f"ask = dict(model='openai/demo', api_base={demo.url + '/v1'!r}, api_key='x', "
        f"messages={FRANCE!r}, temperature=0)\n"
        "print(litellm.completion(**ask).choices[0].message.content)\n"
        "parts = litellm.completion(stream=True, **ask)\n"
        "print(''.join(part.choices[0].delta.content or '' for part in parts))\n"
    )
    environ = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, env=environ, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.stdout.splitlines() == [PARIS, PARIS], done.stderr[-2000:]


def test_llm_command_line(demo: Demo, tmp_path: Path) -> None:
    models = [{"model_id": "here", "model_name": "demo", "api_base": demo.url + "/v1"}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))
    done = subprocess.run(
        [sys.executable, "-m", "llm", "-m", "here", "-o", "temperature", "0", "--no-log",
         FRANCE[0]["content"]],
        capture_output=True, text=True, timeout=TIMEOUT_S,
        env={**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "x"},
    )  # fmt: skip
    assert done.stdout.strip() == PARIS, done.stderr[-2000:]
