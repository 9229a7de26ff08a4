"""vLLM's AsyncLLM behind ``generation.Engine``: the only importer of vllm.

Token ids go in, deltas come out.  Errors of vLLM's are translated here and nowhere else.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError
from tokenizers import decoders
from vllm import __version__ as vllm_version
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.envs import enable_envs_cache
from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMError
from vllm.inputs.engine import tokens_input
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector

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
# One conversation of 8,192 tokens with an 8B model (1 GiB) and some slack; filling it with zeros
# takes about a second and a half per GiB at every start.
_CPU_KV_CACHE_BYTES = 1_088 * 2**20
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")
# What a bad configuration or model makes vLLM raise; anything else is a bug and shows itself.
_START_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AssertionError,
    ImportError,
)
_EAGER_FLAGS = ("--enforce-eager", "--no-enforce-eager", "--compilation-config", "-cc", "-O")


class _Parser(FlexibleArgumentParser):  # type: ignore[misc]  # vLLM's is untyped
    """vLLM's flags; a bad one is one sentence instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise StartupError(f"{message[:1].upper()}{message[1:]}. See --help=all for every flag.")


def engine_parser() -> FlexibleArgumentParser:
    """A parser of every engine flag that vLLM has."""
    return AsyncEngineArgs.add_cli_args(_Parser(prog="ochat_serve", add_help=False))


def parse_engine_flags(
    flags: Sequence[str], *, model: str, served_model_name: str, context: int | None
) -> AsyncEngineArgs:
    """vLLM's engine arguments from the command line's engine flags.

    ``context`` (tokens) is the most that the prompt template allows, None for no such bound.
    Raises ``StartupError``.
    """
    namespace = engine_parser().parse_args(["--model", model, *flags])
    args = AsyncEngineArgs.from_cli_args(namespace)
    args.served_model_name = served_model_name
    if context is not None:
        given = args.max_model_len
        args.max_model_len = context if given in (None, -1) else min(given, context)
    if current_platform.is_cpu():
        _cpu_defaults(args, flags)
    _check_devices(args)
    _check_weights(args)
    return args


def _cpu_defaults(args: AsyncEngineArgs, flags: Sequence[str]) -> None:
    if not any(flag.startswith(_EAGER_FLAGS) for flag in flags):
        # Compiled bfloat16 gives wrong text on this backend.
        args.enforce_eager = True
    memory_flags = ("--gpu-memory-utilization", "--kv-cache-memory")
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ and not any(
        flag.startswith(memory_flags) for flag in flags
    ):
        # vLLM would take nine tenths of the machine's memory, which is not a GPU's.
        args.kv_cache_memory_bytes = _CPU_KV_CACHE_BYTES


def _check_devices(args: AsyncEngineArgs) -> None:
    """Fewer devices than ranks is said here, before any weight is read."""
    wanted = args.tensor_parallel_size * args.pipeline_parallel_size
    if wanted == 1 or args.distributed_executor_backend not in (None, "mp") or args.nnodes > 1:
        return
    if current_platform.is_cpu():
        count, what = _cpu_devices(), "memory node(s) to bind a rank to"
    else:
        count, what = current_platform.device_count(), "GPU(s)"
    if wanted > count:
        raise StartupError(
            f"--tensor-parallel-size {args.tensor_parallel_size} x --pipeline-parallel-size "
            f"{args.pipeline_parallel_size} needs {wanted} devices, but this machine has {count} "
            f"{what}. Use smaller values."
        )


def _cpu_devices() -> int:
    """Ranks that vLLM's CPU backend can place: the groups the user names, else memory nodes."""
    from vllm.utils.cpu_resource_utils import get_visible_memory_node

    binding = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    if binding == "nobind":
        return os.cpu_count() or 1
    return len(binding.split("|")) if binding != "auto" else len(get_visible_memory_node())


def _check_weights(args: AsyncEngineArgs) -> None:
    """A folder without weights is said here; vLLM would say it after most of a minute."""
    folder = Path(args.model)
    executor = args.distributed_executor_backend
    if not folder.is_dir() or args.load_format != "auto" or executor not in (None, "mp", "uni"):
        return
    if not any(path for pattern in _WEIGHT_FILES for path in folder.glob(pattern)):
        raise StartupError(
            f"The folder {folder} has no weights ({', '.join(_WEIGHT_FILES)}). "
            "Is its download complete?"
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
    def build(cls, args: AsyncEngineArgs, token_bytes: Callable[[int], bytes]) -> "VllmEngine":
        """Load the model; blocks for as long as that takes.  Raises ``StartupError``."""
        try:
            engine = cls(AsyncLLM.from_engine_args(args), token_bytes)
        except _START_ERRORS as error:
            raise StartupError(
                f"vLLM cannot serve {args.model}: {_first_sentence(error)}"
            ) from error
        # What vLLM's own engine process does when it is ready: variables are read from a cache
        # (one is read for every token), and the collector need not look at what stays anyway.
        enable_envs_cache()
        freeze_gc_heap()
        # vLLM looks the class up there, for backends that bring their own.
        decoders.DecodeStream = decode_stream  # type: ignore[misc, assignment]
        return engine

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

    async def close(self) -> None:
        await asyncio.to_thread(self._llm.shutdown)


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


def _first_sentence(error: Exception) -> str:
    """The cause in one line.  pydantic's errors say it on their third."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ValidationError) and len(lines) > 2:
        where, what = lines[1], lines[2].removeprefix("Value error, ").split(" [type=")[0]
        return what if what[:1].isupper() and "Input" not in what else f"{where}: {what}"
    return lines[0] if lines else type(error).__name__
