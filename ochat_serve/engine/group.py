"""One engine behind several front-end processes, by vLLM's own machinery.

The parent launches the engine, then the front ends with an address each, and waits; every
request goes from the front end that took it straight to the engine and back.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.utils.system_utils import set_process_title
from vllm.v1.engine.utils import bind_engine_zmq_listeners, launch_core_engines
from vllm.v1.executor.abstract import Executor
from vllm.v1.metrics.prometheus import setup_multiprocess_prometheus
from vllm.v1.utils import APIServerProcessManager, wait_for_completion_or_failure

from ochat_serve.engine.errors import first_sentence, startup_errors
from ochat_serve.errors import StartupError

# In a front end: (what the parent handed over, where the engine is) -> its exit code
FrontEnd = Callable[[Any, dict[str, Any]], int]
PARENT_RANK = -1


class Stopped(BaseException):
    """A signal asked the parent to end."""


def run_group(
    args: AsyncEngineArgs, count: int, front_end: FrontEnd, work: Any, *, stop_timeout_s: float
) -> None:
    """Launch the engine and ``count`` front ends; returns after a signal, when all have ended.

    ``front_end(work, connection)`` runs in each of the processes; ``work`` is pickled.  Raises
    ``StartupError`` for an engine that does not start and for a process that dies.
    """
    setup_multiprocess_prometheus()
    args._api_process_count, args._api_process_rank = count, PARENT_RANK
    with _signals_raise(), suppress(Stopped), startup_errors(args.model):
        config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
        listeners = bind_engine_zmq_listeners(config, count)
        launch = launch_core_engines(
            config, Executor.get_class(config), not args.disable_log_stats, listeners.addresses
        )
        _run(launch, listeners, count, (front_end, work), stop_timeout_s)


def _run(
    launch: Any, listeners: Any, count: int, work: tuple[FrontEnd, Any], stop_timeout_s: float
) -> None:
    manager = engines = coordinator = None
    try:
        with launch as launched:
            engines, coordinator = launched.engine_manager, launched.coordinator
            publisher = coordinator.get_stats_publish_address() if coordinator else None
            manager = APIServerProcessManager(
                listen_address="",
                sock=None,
                args=work,  # handed on as it is
                num_servers=count,
                input_listeners=listeners.inputs,
                output_listeners=listeners.outputs,
                target_server_fn=_enter,
                stats_update_address=publisher,
                tensor_queue=launched.tensor_queue,
            )
            launched.watched_frontend_processes = manager.processes
        try:
            wait_for_completion_or_failure(manager, engines, coordinator)
        except RuntimeError as error:
            raise StartupError(f"{first_sentence(error)}. The server ends with it.") from error
    finally:
        # The front ends first: they finish their streams while the engine still works.
        end = time.monotonic() + stop_timeout_s
        for part in (manager, engines, coordinator):
            if part is not None:
                part.shutdown(timeout=max(0.0, end - time.monotonic()))


def _enter(
    _address: str, _sock: None, work: tuple[FrontEnd, Any], connection: dict[str, Any]
) -> None:
    """The beginning of a front-end process."""
    set_process_title("ApiServer", str(connection["client_index"]))
    front_end, handed_over = work
    raise SystemExit(front_end(handed_over, connection))


@contextmanager
def _signals_raise() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # it is ending already
        raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
