"""AsyncLLM without HTTP: the limit that no front end can beat.

Run as a process of its own; prints one JSON object a case.  Arguments: the number of streams and
of tokens of each case as ``STREAMSxTOKENS``, then ``--`` and vLLM's engine flags.
"""

import asyncio
import json
import os
import random
import sys
import time

import uvloop
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from scripts.benchmark.load import quantile

PROMPT_TOKENS = 110


async def _stream(llm: AsyncLLM, name: str, tokens: int, interval: int, gaps: list[float]) -> int:
    rng = random.Random(name)
    prompt = tokens_input([rng.randrange(1_000, 10_000) for _ in range(PROMPT_TOKENS)])
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
    cpu, started = time.process_time(), time.perf_counter()
    counts = await asyncio.gather(
        *(_stream(llm, f"{streams}-{interval}-{n}", tokens, interval, gaps) for n in range(streams))
    )
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {
        "streams": streams,
        "stream_interval": interval,
        "tokens_per_s": sum(counts) / wall,
        "front_us_per_token": 1e6 * cpu / sum(counts),
        "gap_p99_ms": 1e3 * quantile(gaps, 0.99),
    }


async def main(cases: list[str], flags: list[str]) -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(parser.parse_args(flags)))
    await _measure(llm, 4, 16, 1)
    for case in cases:
        streams, tokens = map(int, case.split("x"))
        for interval in (1, 8):
            print(json.dumps(await _measure(llm, streams, tokens, interval)), flush=True)
    llm.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    at = sys.argv.index("--")
    uvloop.run(main(sys.argv[1:at], sys.argv[at + 1 :]))
