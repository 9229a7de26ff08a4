"""vLLM's AsyncLLM behind ``generation.Engine``.

Token ids go in, deltas come out.
"""

import asyncio
import gc
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar, get_args

from prometheus_client import generate_latest
from tokenizers import decoders
from vllm import __version__ as vllm_version
from vllm.config import VllmConfig
from vllm.config.parallel import DistributedExecutorBackend
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.envs import enable_envs_cache
from vllm.exceptions import VLLMError
from vllm.inputs.engine import tokens_input
from vllm.renderers import hf as hf_renderer
from vllm.sampling_params import (
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from vllm.usage.usage_lib import UsageContext
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.metrics.prometheus import get_prometheus_registry
from vllm.v1.metrics.stats import SchedulerStats

from ochat_serve.detokenizing import decode_stream
from ochat_serve.engine.errors import api_error, startup_errors
from ochat_serve.engine.flags import GRAMMAR_BACKEND
from ochat_serve.engine.generations import CollectedGeneration, TextGeneration
from ochat_serve.engine.processes import (
    how_it_ended,
    started_without_interrupt,
    when_one_ends,
)
from ochat_serve.generation import Constraint, EngineInfo, Generation, SamplingOptions

# Seeds of one request with n > 1 are consecutive; vLLM takes -1 for "no seed".
_SEED_RANGE = 2**62
# vLLM's own: None lets it choose among the others.
_EXECUTORS = (None, *get_args(DistributedExecutorBackend))
_Tokenizer = TypeVar("_Tokenizer")


class _Signs:
    """Counts the engine's messages, of which a step sends one at most: stands where vLLM's front
    end, done with a message, hands its statistics on.  Knows no engine, so it keeps none alive."""

    def __init__(self, update: Callable[[SchedulerStats | None], None]) -> None:
        self.count = 0
        self._update = update

    def __call__(self, stats: SchedulerStats | None) -> None:
        self.count += 1
        self._update(stats)


class VllmEngine:
    """``generation.Engine`` on vLLM."""

    def __init__(self, llm: AsyncLLM, token_bytes: Callable[[int], bytes]) -> None:
        self._llm = llm
        self._token_bytes = token_bytes
        self._died = False  # told by the system; vLLM knows by itself where the process is its own
        self._signs = _Signs(llm.output_processor.update_scheduler_stats)
        llm.output_processor.update_scheduler_stats = self._signs
        config = llm.vllm_config.model_config
        scheduler = llm.vllm_config.scheduler_config
        self.info = EngineInfo(
            max_model_len=config.max_model_len,
            vocab_size=config.get_vocab_size(),
            version=vllm_version,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            has_weights=_has_weights(llm.vllm_config),
        )

    @classmethod
    def build(
        cls,
        args: AsyncEngineArgs,
        token_bytes: Callable[[int], bytes],
        connection: Mapping[str, Any] | None = None,
    ) -> "VllmEngine":
        """Load the model, or share one that is loading (``group``) over ``connection``; blocks
        for as long as that takes.  Raises ``StartupError``."""
        # Its copies of the tokenizer (128,000 words: some 60 MiB each) are for prompts rendered by
        # vLLM on worker threads; here its tokenizer is used on the event loop only.
        hf_renderer.maybe_make_thread_pool = _no_copies
        with startup_errors(args.model):
            if connection:
                llm, engine_pids = _connected(args, connection)
            else:
                with started_without_interrupt():
                    llm, engine_pids = AsyncLLM.from_engine_args(args), ()
        # What vLLM's own engine process does when it is ready: variables are read from a cache
        # (one is read for every token), and the collector need not look at what stays anyway.
        enable_envs_cache()
        freeze_gc_heap()
        # vLLM looks the class up there, for backends that bring their own.
        decoders.DecodeStream = decode_stream  # type: ignore[misc, assignment]
        # vLLM asks for it at every request, and the tokenizer finds it out anew.
        llm.renderer.get_eos_token_id = partial(_same, llm.renderer.get_eos_token_id())
        # Or every request's grammar would be compiled again here, on the event loop; each was tried
        # in another process before.
        llm.input_processor.structured_outputs_config = None
        engine = cls(llm, token_bytes)
        if engine_pids:
            when_one_ends(engine_pids, engine._on_death)
        return engine

    @property
    def failure(self) -> str | None:
        if not (self._died or self._llm.errored):
            return None
        manager = self._llm.engine_core.resources.engine_manager
        ends = manager.finished_procs().values() if manager is not None else ()
        how = "".join(f" ({how_it_ended(end)})" for end in ends)
        return f"The engine process has died{how}."

    def _on_death(self) -> None:
        self._died = True

    @property
    def signs_of_life(self) -> int:
        return self._signs.count

    async def answer(self) -> None:
        self._llm._run_output_handler()  # vLLM would read nothing before the first request
        await self._llm.is_paused()
        self._signs.count += 1

    @asynccontextmanager
    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        options: SamplingOptions,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[Generation, None]:
        copies = options.n if options.temperature == 0 else 1
        try:
            params = _sampling_params(options, n=options.n // copies)
            prompt = tokens_input(list(prompt_token_ids), cache_salt=cache_salt)
            collector = await self._llm.add_request(request_id, prompt, params)
        except asyncio.CancelledError:
            await self._llm.abort(request_id)
            raise
        except (VLLMError, ValueError) as error:
            raise api_error(error) from error
        generation = self._generation(collector, options, copies)
        try:
            yield generation
        finally:
            generation.close()
            if not (generation.finished or self._llm.errored):
                await self._llm.abort(collector.request_id, internal=True)

    def _generation(
        self, collector: RequestOutputCollector, options: SamplingOptions, copies: int
    ) -> TextGeneration | CollectedGeneration:
        state = self._llm.output_processor.request_states.get(collector.request_id)
        only_text = options.n == 1 and options.logprobs is None
        if only_text and state is not None and collector.output is None:
            return TextGeneration(collector, state)
        return CollectedGeneration(collector, options, copies, self._token_bytes)

    def metrics(self) -> bytes:
        return generate_latest(get_prometheus_registry())

    async def close(self) -> None:
        gc.unfreeze()  # or what was frozen would count as leaked when the process ends
        await asyncio.to_thread(self._llm.shutdown)


def _no_copies(tokenizer: _Tokenizer, copies: int = 1) -> _Tokenizer:
    return tokenizer


def _has_weights(config: VllmConfig) -> bool:
    """Whether the model's own weights are computed with.  An executor that is not one of vLLM's
    may do anything, such as simulate."""
    executor = config.parallel_config.distributed_executor_backend
    return config.load_config.load_format != "dummy" and executor in _EXECUTORS


def _same(value: int | None) -> int | None:
    return value


def _connected(
    args: AsyncEngineArgs, connection: Mapping[str, Any]
) -> tuple[AsyncLLM, Sequence[int]]:
    """One of several clients of an engine that another process has launched, and its pids."""
    where = dict(connection)
    where.pop("api_server_loads", None)
    engine_pids = where.pop("engine_pids")
    count, index = where.pop("client_count"), where.pop("client_index")
    args._api_process_count, args._api_process_rank = count, index
    llm = AsyncLLM.from_vllm_config(
        args.create_engine_config(UsageContext.OPENAI_API_SERVER),
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=args.enable_log_requests,
        disable_log_stats=args.disable_log_stats,
        client_addresses=where,
        client_count=count,
        client_index=index,
    )
    return llm, engine_pids


def _sampling_params(options: SamplingOptions, n: int) -> SamplingParams:
    return SamplingParams(
        n=n,
        max_tokens=options.max_tokens,
        min_tokens=options.min_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        repetition_penalty=options.repetition_penalty,
        seed=None if options.seed is None else options.seed % _SEED_RANGE,
        stop=list(options.stop),
        stop_token_ids=list(options.stop_token_ids),
        ignore_eos=options.ignore_eos,
        skip_special_tokens=options.skip_special_tokens,
        logit_bias=options.logit_bias,
        logprobs=options.logprobs,
        output_kind=RequestOutputKind.DELTA,
        stream_interval=options.stream_interval,
        structured_outputs=options.constraint and _structured_outputs(options.constraint),
        skip_clone=True,
    )


def _structured_outputs(constraint: Constraint) -> StructuredOutputsParams:
    """vLLM's word for a constraint; the backend is the one that it was tried with."""
    kind = "grammar" if constraint.kind == "choice" else constraint.kind
    params = StructuredOutputsParams(**{kind: constraint.text})
    params._backend = GRAMMAR_BACKEND
    return params
