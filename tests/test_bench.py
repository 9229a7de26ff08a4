"""The bench: its client counts right, its arithmetic holds, and it runs. Nothing here is timed."""

import asyncio
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ochat_serve.app import create_app
from ochat_serve.errors import ServerFault
from ochat_serve.generation import EngineInfo
from ochat_serve.settings import Settings
from scripts.benchmark import cases, report
from scripts.benchmark.load import drive, quantile
from scripts.benchmark.servers import Cpu
from tests.fakes import ScriptedEngine, serving, words
from tests.live import live

ROOT = Path(__file__).parent.parent
ROOMY = EngineInfo(max_model_len=1_000, vocab_size=1_000, version="0")


def test_the_client_counts_what_a_server_sends() -> None:
    engine = ScriptedEngine(script=words("a", "", "b", "c"), info=ROOMY)
    lanes = cases.short(3, 2).lanes("openchat_3.6")
    with live(create_app(Settings(), serving(engine))) as server:
        seen = asyncio.run(drive(server.port, lanes, beside=lanes[:1]))
    assert (seen.requests, seen.failed, seen.tokens) == (6, 0, 24)
    # The role, three texts, the end, the usage and [DONE]; an update without text is no event.
    assert seen.events == 6 * 7
    assert len(seen.first) == 6
    assert len(engine.requests) == 8  # those beside are sent and not counted


def test_a_failing_request_fails_the_run() -> None:
    engine = ScriptedEngine(script=[ServerFault()], info=ROOMY)
    with (
        live(create_app(Settings(), serving(engine))) as server,
        pytest.raises(RuntimeError, match=r"1 requests failed: HTTP/1\.1 500"),
    ):
        asyncio.run(drive(server.port, cases.short(1, 1).lanes("openchat_3.6")))


def test_conversations_grow_by_a_question_and_an_answer() -> None:
    lane = cases.growing(1).lanes("m")[0]
    sent = [json.loads(content)["messages"] for content in lane]
    assert [len(messages) for messages in sent] == list(range(1, 2 * cases.TURNS, 2))
    for before, after in itertools.pairwise(sent):
        assert after[: len(before)] == before
        assert [message["role"] for message in after[-2:]] == ["assistant", "user"]


def test_no_text_of_a_case_was_sent_before_it() -> None:
    """A text that was seen before costs less: it would flatter whoever remembers texts."""

    def questions(lanes: cases.Lanes) -> list[str]:
        sent = [json.loads(content)["messages"] for lane in lanes for content in lane]
        return [messages[-1]["content"] for messages in sent]

    seen = set(questions(cases.warm_up("m")))
    for case in cases.FULL:
        asked = questions(case.lanes("m"))
        if "beside" not in case.name:  # the same on purpose: alone, and beside others
            assert len(set(asked)) == len(asked)
            assert not seen & set(asked), case.name
        seen |= set(asked)


def run_of(server: str, number: int, us: float) -> report.Run:
    figures = {"front_us_per_token": us, "gap_p99_ms": 30.0, "tokens_per_s": 1.0}
    streams = dict.fromkeys(("streams_1", "streams_32", "streams_256"), figures)
    start = {"start_s": 30.0, "front_rss_mib": 1_000.0}
    return {"server": server, "round": number, **start, "cases": streams}


def test_ratios_are_taken_within_a_round() -> None:
    runs = [run_of("a", 0, 60), run_of("b", 0, 30), run_of("a", 1, 100), run_of("b", 1, 20)]
    label = "256 streams: front-end CPU, us per token"
    assert report.ratios(runs, "a")[label] == {"b": (0.35, 0.2, 0.5)}
    assert report.medians(runs)[label] == {"a": 80, "b": 25}
    table = report.markdown(report.medians(runs), report.ratios(runs, "a"))
    assert f"| {label} | 80 | 25 | 0.35 (0.20-0.50) |" in table


def test_the_limit_is_shown_beside_the_servers() -> None:
    """As shares within a round, as all ratios are."""
    runs = [run_of("a", 0, 60), run_of("a", 1, 60), run_of("a", 2, 60)]
    for run, rate in zip(runs, (98.0, 45.0, 190.0), strict=True):
        run["cases"]["streams_32"] = {"tokens_per_s": rate}
    limits = [
        {"round": number, "streams": 32, "stream_interval": every, "tokens_per_s": rate}
        | {"front_us_per_token": 20.0 / every}
        for number, rate in enumerate((100.0, 50.0, 200.0))
        for every in (1, 8)
    ]
    table = report.limit_markdown(runs, limits)
    assert "| 32 | 1 | 20 | 100 | 98 (0.95, 0.90-0.98) |" in table
    assert "| 32 | 8 | 2.5 | 100 | 98 (0.95, 0.90-0.98) |" in table
    beside = [{"beside": 4, "ttft_p50_ms": ms, "ttft_p99_ms": 10 * ms} for ms in (27.0, 28, 40)]
    assert report.limit_markdown(runs, [*limits, *beside]) == table
    told = report.limit_beside_markdown([*limits, *beside])
    assert told == "- beside 4 long prompts: TTFT p50 28 ms, p99 280 ms"


def test_the_best_rate_has_an_even_pace() -> None:
    run = run_of("a", 0, 60)
    rates = [(1, 5.0, 20), (32, 100.0, 30), (256, 800.0, 55), (1024, 3000.0, 61)]
    run["cases"] = {
        f"streams_{count}": {"tokens_per_s": rate, "gap_p99_ms": gap} for count, rate, gap in rates
    }
    assert report.best_rate(run) == 800


def test_cpu_and_quantiles() -> None:
    assert Cpu(3, 5) - Cpu(1, 2) == Cpu(2, 3)
    assert [quantile(range(100), share) for share in (0, 0.5, 0.99, 1)] == [0, 50, 99, 99]
    assert quantile([], 0.5) == 0


def test_it_runs(tmp_path: Path) -> None:
    """Both servers, once, with a few requests; the files that people look at come out."""
    command = [sys.executable, "-m", "scripts.benchmark", "--smoke", "--rounds", "1"]
    command += ["--only", "vllm", "ours, auto", "--step-ms", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["server"] for run in results["runs"]] == ["vllm", "ours, auto"]
    for run in results["runs"]:
        assert run["cases"].keys() == {case.name for case in cases.SMOKE}
        assert all(figures["tokens"] > 0 for figures in run["cases"].values())
        assert run["front_rss_mib"] > 0
    assert str(tmp_path) not in json.dumps(results["command"])
    assert "| start to first answer, s |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
