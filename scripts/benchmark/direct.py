"""AsyncLLM without HTTP: the limit that no front end can beat.

Run as a process of its own; prints one JSON object a case.  Arguments: the cases (the number of
streams and of tokens as ``STREAMSxTOKENS``; ``besideN`` for short requests beside N long ones),
then ``--`` and vLLM's engine flags.
"""

import asyncio
import json
import os
import random
import sys
import time

import uvloop
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import TokensInput, tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from scripts.benchmark.cases import PROMPT_WORDS
from scripts.benchmark.load import quantile, words

SHORT_PROMPT_TOKENS = 30
LONG_PROMPT_TOKENS = 100_000
SHORT_REQUESTS = 20


def _prompt(name: str, tokens: int) -> TokensInput:
    rng = random.Random(name)
    return tokens_input([rng.randrange(1_000, 10_000) for _ in range(tokens)])


def _chat(llm: AsyncLLM, name: str) -> TokensInput:
    """A prompt such as the servers get."""
    said = [{"role": "user", "content": words(random.Random(name), PROMPT_WORDS)}]
    ids = llm.get_tokenizer().apply_chat_template(
        said, add_generation_prompt=True, return_dict=False
    )
    return tokens_input(ids)


async def _stream(
    llm: AsyncLLM, name: str, prompt: TokensInput, tokens: int, interval: int, gaps: list[float]
) -> int:
    params = SamplingParams(
        max_tokens=tokens,
        ignore_eos=True,
        temperature=0.7,
        output_kind=RequestOutputKind.DELTA,
        stream_interval=interval,
        skip_clone=True,
    )
    count, last = 0, None
    async for output in llm.generate(prompt, params, name):
        now = time.perf_counter()
        if last is not None:
            gaps.append(now - last)
        last = now
        count += len(output.outputs[0].token_ids)
    return count


async def _measure(llm: AsyncLLM, streams: int, tokens: int, interval: int) -> dict[str, float]:
    gaps: list[float] = []
    names = [f"{streams}-{interval}-{n}" for n in range(streams)]
    prompts = {name: _chat(llm, name) for name in names}
    cpu, started = time.process_time(), time.perf_counter()
    counts = await asyncio.gather(
        *(_stream(llm, name, prompt, tokens, interval, gaps) for name, prompt in prompts.items())
    )
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {
        "streams": streams,
        "stream_interval": interval,
        "tokens_per_s": sum(counts) / wall,
        "front_us_per_token": 1e6 * cpu / sum(counts),
        "gap_p99_ms": 1e3 * quantile(gaps, 0.99),
    }


async def _first_token_s(llm: AsyncLLM, name: str, prompt: TokensInput) -> float:
    params = SamplingParams(
        max_tokens=2, ignore_eos=True, output_kind=RequestOutputKind.DELTA, skip_clone=True
    )
    started, first = time.perf_counter(), 0.0
    async for _ in llm.generate(prompt, params, name):
        first = first or time.perf_counter() - started
    return first


async def _measure_beside(llm: AsyncLLM, count: int) -> dict[str, float]:
    """One short request at a time, beside ``count`` long prompts that come at once."""
    prompts = [_prompt(f"long-{n}", LONG_PROMPT_TOKENS) for n in range(count)]
    beside = [
        asyncio.create_task(_first_token_s(llm, f"long-{count}-{n}", prompt))
        for n, prompt in enumerate(prompts)
    ]
    first = [
        await _first_token_s(llm, name, _prompt(name, SHORT_PROMPT_TOKENS))
        for name in (f"short-{count}-{n}" for n in range(SHORT_REQUESTS))
    ]
    await asyncio.gather(*beside)
    told = {f"ttft_p{share:.0f}_ms": 1e3 * quantile(first, share / 100) for share in (50, 99)}
    return {"beside": count, **told}


async def main(cases: list[str], flags: list[str]) -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(parser.parse_args(flags)))
    await _measure(llm, 4, 16, 1)
    for case in cases:
        if case.startswith("beside"):
            found = await _measure_beside(llm, int(case.removeprefix("beside")))
            print(json.dumps(found), flush=True)
            continue
        streams, tokens = map(int, case.split("x"))
        for interval in (1, 8):
            print(json.dumps(await _measure(llm, streams, tokens, interval)), flush=True)
    llm.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    at = sys.argv.index("--")
    uvloop.run(main(sys.argv[1:at], sys.argv[at + 1 :]))
