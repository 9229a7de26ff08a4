"""vLLM's engine flags: parsed by vLLM, with defaults and checks for what it says too late."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from ochat_serve.errors import StartupError

# One conversation of 8,192 tokens with an 8B model (1 GiB) and some slack; filling it with zeros
# takes about a second and a half per GiB at every start.
_CPU_KV_CACHE_BYTES = 1_088 * 2**20
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")
# The one that grammars are tried with before they get here.
GRAMMAR_BACKEND = "xgrammar"
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
    _set_grammar_backend(args)
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


def _set_grammar_backend(args: AsyncEngineArgs) -> None:
    config = args.structured_outputs_config
    if config.backend == "auto":
        # White space between values would be free, and small models write it without end.
        config.backend, config.disable_any_whitespace = GRAMMAR_BACKEND, True
    if config.backend != GRAMMAR_BACKEND:
        raise StartupError(
            f"--structured-outputs-config: the backend {config.backend} is not supported; schemas "
            f"and grammars are checked for {GRAMMAR_BACKEND}."
        )


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
