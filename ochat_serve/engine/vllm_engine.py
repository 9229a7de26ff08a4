"""vLLM's AsyncLLM behind ``generation.Engine``.

Token ids go in, deltas come out.  Errors of vLLM's are translated here and nowhere else.
"""

import asyncio
import gc
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import generate_latest
from pydantic import ValidationError
from tokenizers import decoders
from vllm import __version__ as vllm_version
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.envs import enable_envs_cache
from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMError
from vllm.inputs.engine import tokens_input
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.metrics.prometheus import get_prometheus_registry

from ochat_serve.detokenizing import decode_stream
from ochat_serve.errors import ApiError, InvalidRequest, ServerFault, StartupError, Unavailable
from ochat_serve.generation import (
    Delta,
    EngineInfo,
    FinishReason,
    PositionLogprobs,
    SamplingOptions,
    TokenLogprob,
    Update,
)

# vLLM's finish reasons that are OpenAI's or mean the same; any other is a failed generation.
FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "repetition": "stop",
}
# Seeds of one request with n > 1 are consecutive; vLLM takes -1 for "no seed".
_SEED_RANGE = 2**62
# What a bad configuration or model makes vLLM raise; anything else is a bug and shows itself.
START_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AssertionError,
    ImportError,
)


class VllmEngine:
    """``generation.Engine`` on vLLM."""

    def __init__(self, llm: AsyncLLM, token_bytes: Callable[[int], bytes]) -> None:
        self._llm = llm
        self._token_bytes = token_bytes
        config = llm.vllm_config.model_config
        self.info = EngineInfo(
            max_model_len=config.max_model_len,
            vocab_size=config.get_vocab_size(),
            version=vllm_version,
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
        try:
            llm = _connected(args, connection) if connection else AsyncLLM.from_engine_args(args)
        except START_ERRORS as error:
            raise StartupError(
                f"vLLM cannot serve {args.model}: {first_sentence(error)}"
            ) from error
        # What vLLM's own engine process does when it is ready: variables are read from a cache
        # (one is read for every token), and the collector need not look at what stays anyway.
        enable_envs_cache()
        freeze_gc_heap()
        # vLLM looks the class up there, for backends that bring their own.
        decoders.DecodeStream = decode_stream  # type: ignore[misc, assignment]
        return cls(llm, token_bytes)

    @property
    def failure(self) -> str | None:
        return "The engine process has died." if self._llm.errored else None

    @asynccontextmanager
    async def generate(
        self, request_id: str, prompt_token_ids: Sequence[int], options: SamplingOptions
    ) -> AsyncGenerator["VllmGeneration", None]:
        copies = options.n if options.temperature == 0 else 1
        try:
            params = _sampling_params(options, n=options.n // copies)
            collector = await self._llm.add_request(
                request_id, tokens_input(list(prompt_token_ids)), params
            )
        except asyncio.CancelledError:
            await self._llm.abort(request_id)
            raise
        except (VLLMError, ValueError) as error:
            raise api_error(error) from error
        generation = VllmGeneration(collector, options, copies, self._token_bytes)
        try:
            yield generation
        finally:
            collector.close()
            if not (generation.finished or self._llm.errored):
                await self._llm.abort(collector.request_id, internal=True)

    def metrics(self) -> bytes:
        return generate_latest(get_prometheus_registry())

    async def close(self) -> None:
        gc.unfreeze()  # or what was frozen would count as leaked when the process ends
        await asyncio.to_thread(self._llm.shutdown)


def _connected(args: AsyncEngineArgs, connection: Mapping[str, Any]) -> AsyncLLM:
    """One of several clients of an engine that another process has launched."""
    where = dict(connection)
    where.pop("api_server_loads", None)
    count, index = where.pop("client_count"), where.pop("client_index")
    args._api_process_count, args._api_process_rank = count, index
    return AsyncLLM.from_vllm_config(
        args.create_engine_config(UsageContext.OPENAI_API_SERVER),
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=args.enable_log_requests,
        disable_log_stats=args.disable_log_stats,
        client_addresses=where,
        client_count=count,
        client_index=index,
    )


class _Signal:
    """Stands where vLLM's collector has an asyncio.Event, and calls instead of waking a task."""

    def __init__(self, ready: Callable[[], None]) -> None:
        self.set = ready

    def clear(self) -> None:
        """Nothing is kept: ``set`` is called whenever something has come to an empty collector."""


class VllmGeneration:
    """``generation.Generation`` over vLLM's collector, which merges what nobody takes yet."""

    def __init__(
        self,
        collector: RequestOutputCollector,
        options: SamplingOptions,
        copies: int,
        token_bytes: Callable[[int], bytes],
    ) -> None:
        self.finished = False
        self._collector = collector
        self._copies = copies
        self._top_logprobs = options.logprobs
        self._token_bytes = token_bytes

    def listen(self, ready: Callable[[], None]) -> None:
        self._collector.ready = _Signal(ready)
        if self._collector.output is not None:
            ready()

    def take(self) -> Update | None:
        try:
            output = self._collector.get_nowait()
        except (VLLMError, ValueError) as error:
            raise api_error(error) from error
        if output is None:
            return None
        self.finished = output.finished
        return self._update(output)

    def _update(self, output: RequestOutput) -> Update:
        deltas = [self._delta(choice) for choice in output.outputs]
        if self._copies > 1:  # every greedy choice is the same choice
            deltas = [
                Delta(index, delta.text, delta.num_tokens, delta.finish_reason, delta.logprobs)
                for delta in deltas
                for index in range(self._copies)
            ]
        return Update(deltas, output.num_cached_tokens or 0)

    def _delta(self, output: CompletionOutput) -> Delta:
        finish_reason = None
        if output.finish_reason is not None:
            finish_reason = FINISH_REASONS.get(output.finish_reason)
            if finish_reason is None:
                raise Unavailable(
                    "The generation was given up by the engine. Please try again.",
                    code="engine_failed",
                    retry_after_s=1,
                )
        top = self._top_logprobs
        logprobs = None if top is None else self._logprobs(output, top)
        return Delta(output.index, output.text, len(output.token_ids), finish_reason, logprobs)

    def _logprobs(self, output: CompletionOutput, top: int) -> list[PositionLogprobs]:
        positions = list(zip(output.token_ids, output.logprobs or (), strict=False))
        if output.finish_reason == "stop" and not isinstance(output.stop_reason, str):
            positions = positions[:-1]  # the stop token is not part of the text
        return [self._position(token_id, logprobs, top) for token_id, logprobs in positions]

    def _position(self, token_id: int, logprobs: dict[int, Any], top: int) -> PositionLogprobs:
        ranked = sorted(logprobs.items(), key=lambda item: item[1].rank)[:top]
        return PositionLogprobs(
            TokenLogprob(self._token_bytes(token_id), logprobs[token_id].logprob),
            tuple(TokenLogprob(self._token_bytes(other), entry.logprob) for other, entry in ranked),
        )


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
        skip_clone=True,
    )


def api_error(error: Exception) -> ApiError:
    """What a client is told of an error of vLLM's.  First match wins."""
    if isinstance(error, EngineDeadError):
        return Unavailable(
            "The engine has stopped, and the server ends with it.",
            code="engine_dead",
            retry_after_s=10,
        )
    if isinstance(error, GracefulHTTPError):
        return Unavailable(error.message, code="overloaded", retry_after_s=1)
    if isinstance(error, VLLMClientError | ValueError):
        message = str(error.args[0]) if error.args else "The model refuses this request."
        return InvalidRequest(message, param=getattr(error, "parameter", None))
    return ServerFault()


def first_sentence(error: Exception) -> str:
    """The cause in one line.  pydantic's errors say it on their third."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ValidationError) and len(lines) > 2:
        where, what = lines[1], lines[2].removeprefix("Value error, ").split(" [type=")[0]
        return what if what[:1].isupper() and "Input" not in what else f"{where}: {what}"
    return lines[0] if lines else type(error).__name__
