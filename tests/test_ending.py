"""A process ends with everything below it, and quickly."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ochat_serve.ending import Children
from tests.live import eventually
from tests.process import alive

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
PARENT = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {DEAF!r}])
subprocess.Popen(["sleep", "600"])
time.sleep(600)
"""


@pytest.fixture
def root() -> Iterator[psutil.Process]:
    """Root -> parent -> one that obeys SIGTERM and one that does not."""
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {PARENT!r}])"
    started = subprocess.Popen([sys.executable, "-c", program])
    process = psutil.Process(started.pid)
    assert eventually(lambda: len(process.children(recursive=True)) == 3)
    below = process.children(recursive=True)
    yield process
    for each in (*below, process):
        if alive(each):
            each.kill()
    started.wait()


@pytest.mark.parametrize("grace_s", [0, 0.5])
def test_all_below_end_and_the_root_does_not(root: psutil.Process, grace_s: float) -> None:
    below = root.children(recursive=True)
    root.suspend()  # or it would end with its child
    Children(root.pid).end(grace_s)
    assert eventually(lambda: not any(map(alive, below)))
    assert alive(root)


def test_who_has_lost_its_parent_is_remembered(root: psutil.Process) -> None:
    children = Children(root.pid)
    children.look()
    parent, *orphans = root.children(recursive=True)
    parent.kill()
    assert eventually(lambda: not alive(parent))
    assert all(map(alive, orphans))
    children.end(grace_s=0)
    assert eventually(lambda: not any(map(alive, orphans)))


WATCHED = """
import multiprocessing, signal, sys, time
from ochat_serve import parent

parent.ORPHAN_GRACE_S = 1
if __name__ == "__mp_main__":
    parent.end_with_parent()

def child(deaf):
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("begun", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    context.Process(target=child, args=("deaf" in sys.argv,)).start()
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["obedient", "deaf"])
def test_a_process_ends_with_its_parent_and_not_before(tmp_path: Path, how: str) -> None:
    program = tmp_path / "watched.py"
    program.write_text(WATCHED)
    command = [sys.executable, str(program), how]
    environ = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"begun\n"
        processes = psutil.Process(parent.pid).children(recursive=True)
        (child,) = [each for each in processes if "spawn_main" in " ".join(each.cmdline())]
        try:
            assert not eventually(lambda: not alive(child), within_s=2.5), "its parent lives"
            parent.kill()
            assert eventually(lambda: not alive(child), within_s=10)
        finally:
            if alive(child):
                child.kill()


def test_leaving_runs_exit_handlers_and_flushes_but_waits_for_no_thread() -> None:
    program = """
import atexit, threading, time
from ochat_serve.ending import leave
atexit.register(lambda: print("bye"))
threading.Thread(target=time.sleep, args=(600,)).start()
print("hello")
leave(7)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    assert done.returncode == 7
    assert done.stdout.split() == ["hello", "bye"]
