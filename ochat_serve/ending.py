"""How a process ends, and those below it."""

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from types import FrameType
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


class Stopped(BaseException):
    """A signal asked the parent of front ends to end."""


class ParentSignals:
    """What signals do to the parent of ``front_ends``, for as long as it lives.

    The first one raises ``Stopped`` wherever the parent is, unless ``is_ending``.  From the second
    on front ends get ``hurry``; before there are any, the parent ends at once.  ``reload`` is
    passed on to them.
    """

    def __init__(self, hurry: signal.Signals, reload: signal.Signals) -> None:
        self.front_ends: Sequence[BaseProcess] = ()
        self.children = Children()
        self.exit_code = 0
        self.is_ending = False
        self.reload = reload
        self._hurry = hurry
        self._told_to_end = False

    def handle(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        signal.signal(self.reload, self._pass_on)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_second, self._told_to_end = self._told_to_end, True
        if is_second:
            self._end_now(128 + number)
        elif not self.is_ending:
            raise Stopped

    def _end_now(self, exit_code: int) -> None:
        self.exit_code = exit_code
        if not self.front_ends:
            self.children.end(grace_s=0)
            os._exit(exit_code)
        self._pass_on(self._hurry)

    def _pass_on(self, number: int, frame: FrameType | None = None) -> None:
        for process in self.front_ends:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)
