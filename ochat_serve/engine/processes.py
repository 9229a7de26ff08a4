"""vLLM's processes as the system sees them: their signals and their end."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker

import psutil

_LOOK_INTERVAL_S = 1


@contextmanager
def started_without_interrupt() -> Iterator[None]:
    """Processes started within never see SIGINT: Ctrl-C in a terminal goes to all of a group, and
    would stop the engine under streams that the server lets finish."""
    # It would unblock the signal when it is started, which is with the first process.
    resource_tracker.ensure_running()
    with started_with_blocked(signal.SIGINT):
        yield


@contextmanager
def started_with_blocked(number: signal.Signals) -> Iterator[None]:
    """Processes started within see that signal when they unblock it: until then it would end
    them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def how_it_ended(exit_code: int) -> str:
    """multiprocessing's exit code in words; below 0 it is a signal's number."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"


def when_one_ends(pids: Sequence[int], then: Callable[[], None]) -> None:
    """Call ``then``, from a thread, when one of these processes has ended.  They may be anybody's
    children, so the system tells nobody: they are looked at once a second."""
    processes = [psutil.Process(pid) for pid in pids]

    def look() -> None:
        while all(map(_runs, processes)):
            time.sleep(_LOOK_INTERVAL_S)
        then()

    threading.Thread(target=look, name="engine watch", daemon=True).start()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
