"""How a process ends, and those below it."""

import atexit
import contextlib
import os
import sys
from typing import NoReturn

import psutil


def leave(exit_code: int) -> NoReturn:
    """End this process without taking the interpreter apart, which takes seconds once torch is
    loaded: exit handlers run and buffers are flushed, threads are not waited for."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it any more
            stream.flush()
    os._exit(exit_code)


class Children:
    """The processes below one.

    They are remembered from each ``look``: a worker whose engine was killed is below nobody any
    more, and still holds its device.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._root = psutil.Process(pid)
        self._known: set[psutil.Process] = set()

    def look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self._known.update(self._root.children(recursive=True))

    def end(self, grace_s: float) -> None:
        """End all that were ever seen: asked first, if there is time, then killed."""
        self.look()
        children = [child for child in self._known if not _ends_by_itself(child)]
        if grace_s:
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.terminate()
        _, alive = psutil.wait_procs(children, timeout=grace_s)
        for child in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def _ends_by_itself(child: psutil.Process) -> bool:
    """Python's resource tracker does, after cleaning up."""
    try:
        return any("multiprocessing.resource_tracker" in word for word in child.cmdline())
    except psutil.NoSuchProcess:
        return True
