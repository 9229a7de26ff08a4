"""From runs to figures, ratios and a table."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.benchmark.load import Seen, quantile
from scripts.benchmark.servers import Cpu

Figures = dict[str, float]
Run = dict[
    str, Any
]  # {"server": name, "start_s": ..., "front_rss_mib": ..., "cases": {name: Figures}}


def figures(seen: Seen, cpu: Cpu) -> Figures:
    """What one case shows of one server."""
    return {
        "requests": seen.requests,
        "tokens": seen.tokens,
        "events": seen.events,
        "wall_s": seen.wall_s,
        "tokens_per_s": seen.tokens / seen.wall_s,
        "tokens_per_event": seen.tokens / max(1, seen.events - 2 * seen.requests),
        "front_us_per_token": 1e6 * cpu.front_s / max(1, seen.tokens),
        "front_ms_per_request": 1e3 * cpu.front_s / max(1, seen.requests),
        "front_cores": cpu.front_s / seen.wall_s,
        "engine_cpu_s": cpu.engine_s,
        "ttft_p50_ms": 1e3 * quantile(seen.first, 0.5),
        "ttft_p99_ms": 1e3 * quantile(seen.first, 0.99),
        "gap_p50_ms": 1e3 * quantile(seen.gaps, 0.5),
        "gap_p99_ms": 1e3 * quantile(seen.gaps, 0.99),
    }


@dataclass(frozen=True)
class Row:
    """One line of the table: a figure of a run, None where the run does not have it."""

    label: str
    of: Callable[[Run], float | None]


def _case(name: str, figure: str, label: str) -> Row:
    return Row(label, lambda run: run["cases"].get(name, {}).get(figure))


def best_rate(run: Run) -> float | None:
    """The highest tokens/s at which the p99 gap is not yet twice that of the fewest streams
    above one; the cases tried are all that is known of what lies between."""
    cases = [figures for name, figures in run["cases"].items() if name.startswith("streams_")]
    if len(cases) < 3:
        return None
    bound = 2 * cases[1]["gap_p99_ms"]
    return max(case["tokens_per_s"] for case in cases[1:] if case["gap_p99_ms"] < bound)


def rows(runs: Sequence[Run]) -> list[Row]:
    names = [name for name in runs[0]["cases"] if name.startswith("streams_")]
    table: list[Row] = []
    for name in names:
        said = f"{name.removeprefix('streams_')} streams"
        table += [
            _case(name, "front_us_per_token", f"{said}: front-end CPU, us per token"),
            _case(name, "ttft_p50_ms", f"{said}: TTFT p50, ms"),
            _case(name, "ttft_p99_ms", f"{said}: TTFT p99, ms"),
            _case(name, "gap_p99_ms", f"{said}: gap p99, ms"),
            _case(name, "tokens_per_s", f"{said}: tokens/s"),
        ]
    for name, said in (
        ("short", "short request"),
        ("twenty_turns", "twenty turns, new"),
        ("growing", "twenty turns, growing"),
    ):
        table += [
            _case(name, "front_ms_per_request", f"{said}: front-end CPU, ms"),
            _case(name, "ttft_p50_ms", f"{said}: TTFT p50, ms"),
        ]
    for name, said in (
        ("short_beside_0_long", "one short request alone"),
        ("short_beside_4_long", "one beside four of 100,000 tokens"),
    ):
        table += [
            _case(name, "ttft_p50_ms", f"{said}: TTFT p50, ms"),
            _case(name, "ttft_p99_ms", f"{said}: TTFT p99, ms"),
        ]
    table += [
        Row("highest tokens/s before the p99 gap doubles", best_rate),
        Row("front end's memory, MiB", lambda run: run["front_rss_mib"]),
        Row("start to first answer, s", lambda run: run["start_s"]),
    ]
    return [row for row in table if row.of(runs[0]) is not None]


def medians(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """{row label: {server: median over its runs}}."""
    servers = list(dict.fromkeys(run["server"] for run in runs))
    return {
        row.label: {
            server: statistics.median(
                value
                for run in runs
                if run["server"] == server and (value := row.of(run)) is not None
            )
            for server in servers
        }
        for row in rows(runs)
    }


def ratios(runs: Sequence[Run], base: str) -> dict[str, dict[str, tuple[float, float, float]]]:
    """{row label: {server: (median, lowest, highest) ratio to ``base`` of the same round}}."""
    table: dict[str, dict[str, tuple[float, float, float]]] = {}
    by_round: dict[int, dict[str, Run]] = {}
    for run in runs:
        by_round.setdefault(run["round"], {})[run["server"]] = run
    whole = [rounds for rounds in by_round.values() if base in rounds]
    for row in rows(runs):
        for server in dict.fromkeys(run["server"] for run in runs if run["server"] != base):
            found = [
                value / against
                for rounds in whole
                if server in rounds
                and (value := row.of(rounds[server])) is not None
                and (against := row.of(rounds[base]))
            ]
            if found:
                entry = (statistics.median(found), min(found), max(found))
                table.setdefault(row.label, {})[server] = entry
    return table


def markdown(
    middle: Mapping[str, Mapping[str, float]],
    against: Mapping[str, Mapping[str, tuple[float, float, float]]],
) -> str:
    """The table that people read: medians, and ratios with their spread."""
    servers = list(next(iter(middle.values())))
    others = [server for server in servers if any(server in row for row in against.values())]
    head = ["", *servers, *(f"{server} / {servers[0]}" for server in others)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for label, values in middle.items():
        found = against.get(label, {})
        spread = [
            f"{found[server][0]:.2f} ({found[server][1]:.2f}-{found[server][2]:.2f})"
            if server in found
            else ""
            for server in others
        ]
        lines.append([label, *(_short(values[server]) for server in servers), *spread])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def limit_markdown(runs: Sequence[Run], limits: Sequence[Mapping[str, float]]) -> str:
    """AsyncLLM without HTTP, and what of its throughput in the same round each server keeps.
    "" if not measured.

    ``limits``: one entry a round, number of streams and tokens an update.
    """
    servers = list(dict.fromkeys(run["server"] for run in runs))
    limits = [entry for entry in limits if "streams" in entry]
    if not limits:
        return ""
    kinds = list(dict.fromkeys((entry["streams"], entry["stream_interval"]) for entry in limits))
    told = "AsyncLLM without HTTP: us per token"
    head = ["streams", "tokens an update", told, "tokens/s", *(f"{s}: tokens/s" for s in servers)]
    lines = [head, ["---:"] * len(head)]
    for streams, interval in kinds:
        entries = [e for e in limits if (e["streams"], e["stream_interval"]) == (streams, interval)]
        rate = {entry["round"]: entry["tokens_per_s"] for entry in entries}
        lines.append(
            [
                f"{streams:.0f}",
                f"{interval:.0f}",
                _short(statistics.median(entry["front_us_per_token"] for entry in entries)),
                _short(statistics.median(rate.values())),
                *(_kept(runs, server, f"streams_{streams:.0f}", rate) for server in servers),
            ]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def limit_beside_markdown(limits: Sequence[Mapping[str, float]]) -> str:
    """A short request's first token without HTTP, beside long prompts.  "" if not measured."""
    lines = []
    for count in dict.fromkeys(entry["beside"] for entry in limits if "beside" in entry):
        entries = [entry for entry in limits if entry.get("beside") == count]
        told = (
            f"p{share} {_short(statistics.median(e[f'ttft_p{share}_ms'] for e in entries))} ms"
            for share in (50, 99)
        )
        lines.append(f"- beside {count:.0f} long prompts: TTFT {', '.join(told)}")
    return "\n".join(lines)


def _kept(runs: Sequence[Run], server: str, case: str, limit: Mapping[float, float]) -> str:
    """A server's median rate, and its share of the limit's (with the lowest and the highest)."""
    rates = {
        run["round"]: run["cases"][case]["tokens_per_s"]
        for run in runs
        if run["server"] == server and case in run["cases"]
    }
    shares = [rate / limit[number] for number, rate in rates.items() if number in limit]
    if not shares:
        return ""
    spread = f"{statistics.median(shares):.2f}, {min(shares):.2f}-{max(shares):.2f}"
    return f"{_short(statistics.median(rates.values()))} ({spread})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
