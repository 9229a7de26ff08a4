"""One engine behind several front-end processes, by vLLM's own machinery.

The parent launches the engine, then the front ends with an address each, and waits; every
request goes from the front end that took it straight to the engine and back.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.utils.system_utils import set_process_title
from vllm.v1.engine.utils import bind_engine_zmq_listeners, launch_core_engines
from vllm.v1.executor.abstract import Executor
from vllm.v1.metrics.prometheus import setup_multiprocess_prometheus
from vllm.v1.utils import APIServerProcessManager, wait_for_completion_or_failure

from ochat_serve.ending import Children
from ochat_serve.engine.errors import first_sentence, startup_errors
from ochat_serve.engine.processes import (
    how_it_ended,
    started_with_blocked,
    started_without_interrupt,
)
from ochat_serve.errors import StartupError

# In a front end: (what the parent handed over, where the engine is) -> its exit code
FrontEnd = Callable[[Any, dict[str, Any]], int]
PARENT_RANK = -1
# It has nothing left to do when its turn comes.
ENGINE_STOP_S = 10
CHILDREN_GRACE_S = 3


class Stopped(BaseException):
    """A signal asked the parent to end."""


def run_group(
    args: AsyncEngineArgs,
    count: int,
    front_end: FrontEnd,
    work: Any,
    *,
    stop_timeout_s: float,
    hurry: signal.Signals,
    reload: signal.Signals,
) -> int:
    """Launch the engine and ``count`` front ends; returns after a signal, when all have ended: the
    exit code.  After a second signal the front ends get ``hurry``.
    ``reload`` is passed on to them; they are started with it blocked.

    ``front_end(work, connection)`` runs in each of the processes; ``work`` is pickled.  Raises
    ``StartupError`` for an engine that does not start and for a process that dies.
    """
    setup_multiprocess_prometheus()
    args._api_process_count, args._api_process_rank = count, PARENT_RANK
    signals = _Signals(hurry, reload)
    with signals.handled(), suppress(Stopped), startup_errors(args.model):
        config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
        listeners = bind_engine_zmq_listeners(config, count)
        launch = launch_core_engines(
            config, Executor.get_class(config), not args.disable_log_stats, listeners.addresses
        )
        _run(launch, listeners, count, (front_end, work), signals, stop_timeout_s)
    return signals.exit_code


def _run(
    launch: Any,
    listeners: Any,
    count: int,
    work: tuple[FrontEnd, Any],
    signals: "_Signals",
    stop_timeout_s: float,
) -> None:
    manager = engines = coordinator = None
    children = Children()
    try:
        with ExitStack() as started:
            with started_without_interrupt():
                launched = started.enter_context(launch)
                engines, coordinator = launched.engine_manager, launched.coordinator
                publisher = coordinator.get_stats_publish_address() if coordinator else None
                with started_with_blocked(signals.reload):
                    manager = APIServerProcessManager(
                        listen_address="",
                        sock=None,
                        # Handed on as it is.
                        args=(*work, [process.pid for process in engines.processes]),
                        num_servers=count,
                        input_listeners=listeners.inputs,
                        output_listeners=listeners.outputs,
                        target_server_fn=_enter,
                        stats_update_address=publisher,
                        tensor_queue=launched.tensor_queue,
                    )
            children.look()
            signals.front_ends = launched.watched_frontend_processes = manager.processes
        try:
            wait_for_completion_or_failure(manager, engines, coordinator)
        except RuntimeError as error:
            reason = first_sentence(error).removesuffix(".")
            ends = engines.finished_procs().values()
            how = "".join(f" ({how_it_ended(end)})" for end in ends)
            raise StartupError(f"{reason}{how}. The server ends with it.") from error
    finally:
        # The front ends first: they finish their streams while the engine still works.
        if manager is not None:
            manager.shutdown(timeout=stop_timeout_s)
        for part in (engines, coordinator):
            if part is not None:
                part.shutdown(timeout=ENGINE_STOP_S)
        children.end(CHILDREN_GRACE_S)


def _enter(
    _address: str, _sock: None, work: tuple[FrontEnd, Any, list[int]], connection: dict[str, Any]
) -> None:
    """The beginning of a front-end process."""
    set_process_title("ApiServer", str(connection["client_index"]))
    front_end, handed_over, engine_pids = work
    raise SystemExit(front_end(handed_over, {**connection, "engine_pids": engine_pids}))


class _Signals:
    """The first one raises ``Stopped``, and the front ends are asked to finish; from the second on
    they are told to hurry."""

    def __init__(self, hurry: signal.Signals, reload: signal.Signals) -> None:
        self.front_ends: Sequence[BaseProcess] = ()
        self.exit_code = 0
        self.reload = reload
        self._hurry = hurry
        self._stopped = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._stopped:
            self._stopped = True
            raise Stopped
        self.exit_code = 128 + number
        self._pass_on(self._hurry)

    def _pass_on(self, number: int, frame: FrameType | None = None) -> None:
        for process in self.front_ends:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    @contextmanager
    def handled(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        before[self.reload] = signal.signal(self.reload, self._pass_on)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
