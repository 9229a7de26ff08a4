"""The composition: bind the port, answer, load the model, serve until a signal.

The port answers from the first second: vLLM is imported and the model loaded in a thread
beside the running server.
"""

import contextlib
import errno
import hashlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn

from ochat_serve import __version__, cli
from ochat_serve.app import create_app
from ochat_serve.chat_service import ChatService
from ochat_serve.errors import StartupError
from ochat_serve.generation import ServedModel
from ochat_serve.request_log import RequestLog
from ochat_serve.serving import Serving
from ochat_serve.settings import Settings

KEEP_ALIVE_TIMEOUT_S = 5
SHUTDOWN_TIMEOUT_S = 30
BACKLOG = 2048
PHASES = ("finding the model", "importing vLLM", "loading the tokenizer", "loading the weights")


def say(text: str) -> None:
    print(f"ochat_serve: {text}", file=sys.stderr, flush=True)


def _print_engine_help() -> int:
    from ochat_serve.engine import engine_parser

    print("\nvLLM's engine flags:\n")
    for group in engine_parser()._action_groups:
        for action in group._group_actions:
            print("  " + ", ".join(action.option_strings))
    return 0


def run(command: cli.Command) -> int:
    """Serve until a signal ends it.  Returns the exit code; raises ``StartupError``."""
    if command.help_all:
        return _print_engine_help()
    for notice in command.notices:
        say(notice)
    settings = command.settings
    sockets = _bind(settings.host, settings.port)
    log = _open_log(settings)
    serving = Serving()
    server = _Server(
        uvicorn.Config(
            create_app(settings, serving, log),
            loop="uvloop",
            http="httptools",
            access_log=False,
            log_level="warning",
            timeout_keep_alive=KEEP_ALIVE_TIMEOUT_S,
            timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
            backlog=BACKLOG,
            server_header=False,
        )
    )
    host, port = sockets[0].getsockname()[:2]
    say(f"listening on http://{settings.host}:{port} ({host}); loading {settings.model}")
    failures: list[StartupError] = []
    loader = threading.Thread(
        target=_load_into, args=(command, serving, server, failures, log), daemon=True, name="load"
    )
    loader.start()
    server.run(sockets=sockets)
    if failures:
        raise failures[0]
    if serving.chat is None and not loader.is_alive():
        return 1  # a bug: the loading thread has shown its traceback
    if loader.is_alive():
        # A half-built engine cannot be asked to stop; its processes end with this one.
        _end_children()
        os._exit(0)
    return 0


class _Server(uvicorn.Server):
    """uvicorn's server; a signal that was obeyed is not raised again, so the exit code is 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _load_into(
    command: cli.Command,
    serving: Serving,
    server: uvicorn.Server,
    failures: list[StartupError],
    log: RequestLog | None,
) -> None:
    started = time.monotonic()

    def phase(name: str) -> None:
        serving.phase = name
        step = f"[{PHASES.index(name) + 1}/{len(PHASES)}]"
        say(f"{step} {name} ...")

    try:
        served = load(command, phase)
        serving.chat = ChatService(
            served,
            command.settings,
            clock=time.monotonic,
            now=time.time,
            log_content=log is not None and log.content,
        )
        serving.phase = "ready"
        names = ", ".join(served.names)
        say(f"ready in {time.monotonic() - started:.0f} s; models: {names}")
    except StartupError as error:
        failures.append(error)
    finally:
        if serving.chat is None:
            server.should_exit = True


def load(command: cli.Command, phase: Callable[[str], None]) -> ServedModel:
    """Find the model, import vLLM, build the engine.  Blocks; raises ``StartupError``."""
    settings = command.settings
    phase(PHASES[0])
    from ochat_serve.model_source import locate

    source = locate(
        settings.model,
        model_type=settings.model_type,
        served_model_name=settings.served_model_name,
        revision=command.revision,
    )
    phase(PHASES[1])
    # vLLM's engine process must not be forked from a process with threads.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from ochat_serve.engine import VllmEngine, parse_engine_flags
    from ochat_serve.templates.hf import HfTemplate
    from ochat_serve.templates.registry import TEMPLATES
    from ochat_serve.templates.renderer import TemplateRenderer
    from ochat_serve.tokenizer import Tokenizer

    args = parse_engine_flags(
        command.engine_flags,
        model=source.path,
        served_model_name=source.names[0],
        context=source.context,
    )
    phase(PHASES[2])
    tokenizer = Tokenizer.load(
        args.tokenizer or source.path,
        revision=args.tokenizer_revision or args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    template = TEMPLATES.get(source.model_type) or HfTemplate(
        tokenizer.chat_template(), tokenizer.control_tokens
    )
    prompts = TemplateRenderer(template, tokenizer)
    phase(PHASES[3])
    engine = VllmEngine.build(args, tokenizer.token_bytes)
    fingerprint = f"{__version__} {engine.info} {source} {args.dtype} {args.quantization}"
    return ServedModel(
        names=source.names,
        engine=engine,
        prompts=prompts,
        created=int(time.time()),
        owned_by=source.owned_by,
        system_fingerprint="fp_" + hashlib.sha256(fingerprint.encode()).hexdigest()[:10],
    )


def _bind(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of ``host``.  Raises ``StartupError``."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise StartupError(
            f"--host {host} is not an address of any kind: {error.strerror}."
        ) from error
    sockets: list[socket.socket] = []
    problem: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(addresses):
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if port == 0 and sockets:  # the same free port on every address
            address = (address[0], sockets[0].getsockname()[1], *address[2:])
        try:
            bound.bind(address)
            bound.listen(BACKLOG)
            sockets.append(bound)
        except OSError as error:
            bound.close()
            problem = error
            if error.errno == errno.EADDRINUSE:
                break
    if problem is not None and (not sockets or problem.errno == errno.EADDRINUSE):
        for bound in sockets:
            bound.close()
        raise StartupError(_bind_problem(host, port, problem))
    return sockets


def _bind_problem(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} of {host} is in use. Stop the other server or choose another --port."
    return f"{host}:{port} cannot be bound: {error.strerror}."


def _open_log(settings: Settings) -> RequestLog | None:
    if settings.log_file is None:
        return None
    try:
        return RequestLog(
            settings.log_file,
            max_mb=settings.log_max_mb,
            max_count=settings.log_max_count,
            content=settings.log_content,
        )
    except OSError as error:
        raise StartupError(
            f"--log-file {settings.log_file} cannot be written: {error.strerror}."
        ) from error


def _end_children() -> None:
    import psutil

    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    _, alive = psutil.wait_procs(children, timeout=5)
    for child in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
