"""One engine behind several front-end processes, by vLLM's own machinery.

The parent launches the engine, then the front ends with an address each, and waits; every
request goes from the front end that took it straight to the engine and back.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.utils.system_utils import set_process_title
from vllm.v1.engine.utils import bind_engine_zmq_listeners, launch_core_engines
from vllm.v1.executor.abstract import Executor
from vllm.v1.metrics.prometheus import setup_multiprocess_prometheus
from vllm.v1.utils import APIServerProcessManager, wait_for_completion_or_failure

from ochat_serve.ending import ParentSignals
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


def run_group(
    args: AsyncEngineArgs,
    count: int,
    front_end: FrontEnd,
    work: Any,
    signals: ParentSignals,
    *,
    stop_timeout_s: float,
) -> None:
    """Launch the engine and ``count`` front ends; ends when all have ended.

    ``front_end(work, connection)`` runs in each of the processes; ``work`` is pickled.  Raises
    ``Stopped`` after a signal, ``StartupError`` for an engine that does not start and for a process
    that dies.  Front ends are started with ``signals.reload`` blocked.
    """
    setup_multiprocess_prometheus()
    args._api_process_count, args._api_process_rank = count, PARENT_RANK
    with startup_errors(args.model):
        config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
        listeners = bind_engine_zmq_listeners(config, count)
        launch = launch_core_engines(
            config, Executor.get_class(config), not args.disable_log_stats, listeners.addresses
        )
        _run(launch, listeners, count, (front_end, work), signals, stop_timeout_s)


def _run(
    launch: Any,
    listeners: Any,
    count: int,
    work: tuple[FrontEnd, Any],
    signals: ParentSignals,
    stop_timeout_s: float,
) -> None:
    manager = engines = coordinator = None
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
            signals.children.look()
            signals.front_ends = launched.watched_frontend_processes = manager.processes
        try:
            wait_for_completion_or_failure(manager, engines, coordinator)
        except RuntimeError as error:
            reason = first_sentence(error).removesuffix(".")
            ends = engines.finished_procs().values()
            how = "".join(f" ({how_it_ended(end)})" for end in ends)
            raise StartupError(f"{reason}{how}. The server ends with it.") from error
    finally:
        signals.is_ending = True
        # The front ends first: they finish their streams while the engine still works.
        if manager is not None:
            manager.shutdown(timeout=stop_timeout_s)
        for part in (engines, coordinator):
            if part is not None:
                part.shutdown(timeout=ENGINE_STOP_S)
        signals.children.end(CHILDREN_GRACE_S)


def _enter(
    _address: str, _sock: None, work: tuple[FrontEnd, Any, list[int]], connection: dict[str, Any]
) -> None:
    """The beginning of a front-end process."""
    set_process_title("ApiServer", str(connection["client_index"]))
    front_end, handed_over, engine_pids = work
    raise SystemExit(front_end(handed_over, {**connection, "engine_pids": engine_pids}))
