"""Several processes, one file; and processes that are killed."""

import subprocess
import sys
from pathlib import Path

from ochat_serve.usage.counters import Row
from ochat_serve.usage.database import sqlite_database
from tests.live import eventually
from tests.process import ROOT
from tests.usage.accounts import DAY, EVER, of

MANY = 1_000_000


def run(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.usage.{program}", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stored(file: Path) -> list[Row]:
    database = sqlite_database(str(file))
    rows = sorted(database.read(*EVER, None), key=lambda row: row.key)
    database.close()
    return rows


def test_processes_add_up(tmp_path: Path):
    """They start at once on a file that is not there yet, and get in each other's way."""
    file = tmp_path / "usage"
    processes = [run("adder", file, 200, 0.001) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
    assert stored(file) == [Row("a", DAY, of(600)), Row("b", DAY, of(600))]


def test_a_killed_process_loses_less_than_a_second(tmp_path: Path):
    file = tmp_path / "usage"
    process = run("adder", file, MANY, 0.002)
    assert process.stdout is not None
    added = [process.stdout.readline()]
    assert eventually(lambda: stored(file))
    added += [process.stdout.readline() for _ in range(100)]
    process.kill()
    rest, _ = process.communicate()
    moments = [float(line.split()[1]) for line in [*added, *rest.splitlines(keepends=True)]
               if line.endswith("\n")]  # fmt: skip

    rows = stored(file)
    assert [row.key for row in rows] == ["a", "b"]
    for row in rows:
        assert row.counters == of(row.counters.requests), "whole requests only"
    kept_a, kept_b = (row.counters.requests for row in rows)
    assert kept_a - kept_b in (0, 1), "of one moment"
    lost = moments[kept_b:]
    assert kept_b <= len(moments) + 1, "nothing that never was"
    assert not lost or moments[-1] - lost[0] < 1


def test_a_full_disk_loses_nothing(tmp_path: Path):
    process = run("full_disk", tmp_path / "usage")
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "disk" in said
