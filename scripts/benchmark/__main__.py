"""Compare this server with vLLM's own on the same engine and the same flags.

Both are started in turn, several times over, and driven by the same client; what counts is the
ratio within a round, since the machine is the same and as busy for both. By default the engine
is simulated (a GPU's pace without a GPU): the scheduler, the engine process and AsyncLLM are
vLLM's own, only the forward pass is a pause.
"""

import argparse
import asyncio
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import uvloop

from scripts.benchmark import cases, report
from scripts.benchmark.load import drive
from scripts.benchmark.servers import (
    MODEL,
    OURS_AUTO,
    OURS_GUARDED,
    OURS_PERIOD_1,
    VLLM,
    Contender,
    running,
)

ROOT = Path(__file__).parents[2]
SIM = Path(__file__).parent / "sim"
LONG_CONTEXT = 131_072


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument(
        "--engine",
        choices=("sim", "real"),
        default="sim",
        help="sim: a Llama-3-8B shape at a GPU's pace; real: the demo model (default: sim)",
    )
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="a Llama-3-8B shape with dummy weights on the CUDA device that is there",
    )
    parser.add_argument("--rounds", type=int, default=3, help="starts of every server (default: 3)")
    parser.add_argument(
        "--step-ms", type=float, default=25, help="time of one simulated step (default: 25)"
    )
    parser.add_argument("--smoke", action="store_true", help="few and small requests: does it run?")
    parser.add_argument(
        "--cases", nargs="*", default=(), metavar="NAME", help="only these cases (default: all)"
    )
    parser.add_argument(
        "--only",
        nargs="*",
        default=(),
        metavar="SERVER",
        help="only these servers (default: all without guards)",
    )
    parser.add_argument(
        "--api-server-count", type=int, default=1, help="front ends of every server (default: 1)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "bench-results",
        help="folder for results.json, results.md and results.png (default: bench-results)",
    )
    return parser.parse_args()


def engine(args: argparse.Namespace, scratch: Path) -> tuple[list[str], dict[str, str]]:
    """Engine flags and environment of every server under test."""
    if args.engine == "real" and not args.gpu:
        from ochat_serve import demo_model

        flags = ["--model", str(demo_model.ensure()), "--max-model-len", "2048", "--enforce-eager"]
        return flags, {"VLLM_CPU_KVCACHE_SPACE": "1"}
    from tests import model_folders
    from tests.chat_templates import LLAMA3_INSTRUCT

    # The same prompts on both sides: Llama-3-Instruct's template, by its own name for ours.
    model = model_folders.llama3(
        scratch / "llama3",
        chat_template=LLAMA3_INSTRUCT,
        openchat={"model_type": "llama3_instruct"},
    )
    flags = ["--model", str(model)]
    if args.gpu:
        return [*flags, "--load-format", "dummy", "--max-num-seqs", "256"], {}
    _lengthen(model)
    flags += ["--max-model-len", str(LONG_CONTEXT)]
    flags += ["--distributed-executor-backend", "sim_executor.SimExecutor"]
    environ = {"PYTHONPATH": str(SIM), "SIM_STEP_MS": str(args.step_ms), "SIM_KV_GIB": "64"}
    return [*flags, "--max-num-seqs", "1024", "--max-num-batched-tokens", "65536"], environ


def _lengthen(model: Path) -> None:
    """Room for the longest prompts: nothing is computed, so the shape can say what it likes."""
    path = model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"max_position_embeddings": LONG_CONTEXT}))


def chosen_cases(args: argparse.Namespace) -> Sequence[cases.Case]:
    if args.smoke:
        return cases.SMOKE
    every = cases.GPU if args.gpu else cases.REAL if args.engine == "real" else cases.FULL
    return [case for case in every if not args.cases or case.name in args.cases]


async def measure(
    contender: Contender,
    chosen: Sequence[cases.Case],
    flags: Sequence[str],
    environ: Mapping[str, str],
    output: Path,
    scratch: Path,
) -> report.Run:
    """One start of one server through every case."""
    async with running(contender, flags, environ, output, scratch) as server:
        await drive(server.port, cases.warm_up(MODEL))
        found: dict[str, report.Figures] = {}
        for case in chosen:
            lanes = case.lanes(MODEL)
            before = server.cpu()
            seen = await drive(server.port, lanes, beside=case.beside(MODEL))
            found[case.name] = report.figures(seen, server.cpu() - before)
            _tell(f"{contender.name}: {case.name}: {_brief(found[case.name])}")
        return {
            "server": contender.name,
            "start_s": server.start_s,
            "front_rss_mib": server.front_rss_mib(),
            "cases": found,
        }


def direct(
    chosen: Sequence[cases.Case], flags: Sequence[str], environ: Mapping[str, str]
) -> list[dict[str, float]]:
    """AsyncLLM without HTTP, on the same streams and beside the same long prompts."""
    loads = []
    for case in chosen:
        lanes = case.lanes(MODEL)
        if case.name.startswith("streams_"):
            loads.append(f"{len(lanes)}x{json.loads(lanes[0][0])['max_tokens']}")
        elif case.name.startswith("short_beside_"):
            loads.append(f"beside{len(case.beside(MODEL))}")
    command = [sys.executable, "-m", "scripts.benchmark.direct", *loads, "--", *flags]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, check=True, text=True, env={**os.environ, **environ}
    )
    lines = [
        line for line in done.stdout.splitlines() if line.startswith(('{"streams"', '{"beside"'))
    ]
    for line in lines:
        _tell(f"AsyncLLM without HTTP: {line}")
    return [json.loads(line) for line in lines]


def _brief(figures: report.Figures) -> str:
    names = ("front_us_per_token", "front_ms_per_request", "ttft_p50_ms", "gap_p99_ms")
    return ", ".join(f"{name} {figures[name]:.4g}" for name in (*names, "tokens_per_s"))


def _tell(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What a reader must know of the machine; no name, no address."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(": ")[2] for line in lines if "model name" in line), model)
    found: dict[str, Any] = {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
    }
    import torch

    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


async def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 65536), hard), hard))
    chosen = chosen_cases(args)
    contenders = [
        contender
        for contender in (VLLM, OURS_PERIOD_1, OURS_AUTO, OURS_GUARDED)
        if contender.name in args.only or not (args.only or contender.guarded)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        flags, environ = engine(args, Path(scratch))
        served = list(flags)
        if args.api_server_count > 1:
            served += ["--api-server-count", str(args.api_server_count)]
        runs: list[report.Run] = []
        limits: list[dict[str, float]] = []
        for number in range(args.rounds):
            for contender in contenders:
                output = args.out / f"{contender.name.replace(', ', '-').replace(' ', '-')}.log"
                run = await measure(contender, chosen, served, environ, output, Path(scratch))
                runs.append({"round": number, **run})
            if not args.smoke:
                limits += [{"round": number, **it} for it in direct(chosen, flags, environ)]
    write(args.out, runs, limits)


def write(out: Path, runs: Sequence[report.Run], limits: Sequence[Mapping[str, float]]) -> None:
    command = "scripts/bench " + " ".join(_without_out(sys.argv[1:]))
    base = runs[0]["server"]
    middle, against = report.medians(runs), report.ratios(runs, base)
    content = {"command": command.strip(), "machine": machine(), "runs": list(runs)}
    content |= {"medians": middle, "ratios": against, "async_llm": list(limits)}
    (out / "results.json").write_text(json.dumps(_rounded(content), indent=1) + "\n")
    table = report.markdown(middle, against)
    if limits:
        told = report.limit_markdown(runs, limits), report.limit_beside_markdown(limits)
        table = "\n\n".join([table, *filter(None, told)])
    (out / "results.md").write_text(table + "\n")
    if against:
        from scripts.benchmark.plot import draw

        draw(against, base, out / "results.png")
    print(table)


def _without_out(arguments: Sequence[str]) -> list[str]:
    """Where the files went says nothing about what was measured."""
    at = list(arguments).index("--out") if "--out" in arguments else len(arguments)
    return [*arguments[:at], *arguments[at + 2 :]]


def _rounded(value: Any) -> Any:
    """Four digits: the rest is noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return value


if __name__ == "__main__":
    if sys.version_info >= (3, 12):
        asyncio.run(main(), loop_factory=uvloop.new_event_loop)
    else:
        uvloop.install()
        asyncio.run(main())
