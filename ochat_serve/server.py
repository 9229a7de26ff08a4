"""The composition: bind the port, answer, load the model, serve until a signal.

The port answers from the first second: vLLM is imported and the model loaded in a thread
beside the running server.
"""

import errno
import os
import resource
import socket
import time
from collections.abc import MutableSequence

import setproctitle
import uvicorn
from fastapi import FastAPI

from ochat_serve import cli
from ochat_serve.app import cors, create_app
from ochat_serve.cli import say
from ochat_serve.clock import periods
from ochat_serve.errors import StartupError
from ochat_serve.http_bounds import HEADER_TIMEOUT_S, Bounds
from ochat_serve.http_protocol import HttpProtocol
from ochat_serve.http_server import HttpServer
from ochat_serve.limits import Limits, MemoryLimits, no_use_before
from ochat_serve.loader import Load, Loader, Share
from ochat_serve.named_keys import open_key_file
from ochat_serve.request_log import Log, LogFile, Redaction, RequestLog, Retention
from ochat_serve.serving import Serving
from ochat_serve.settings import Settings
from ochat_serve.tls import Certificate
from ochat_serve.usage.ledger import UsageLedger
from ochat_serve.usage.reader import LedgerReader
from ochat_serve.usage_db import open_ledger, used_before

KEEP_ALIVE_TIMEOUT_S = 5
BACKLOG = 2048
OPEN_FILES = 65_536
# Files that are no connections: libraries, the log, the engine's sockets.
OTHER_FILES = 256
# Beyond its own time a request may be busy with a slow client's last bytes.
LEASE_GRACE_S = 120


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
    prepare(command)
    settings = command.settings
    open_key_file(settings)  # a bad one is told before the port is taken
    sockets = bind(settings.host, settings.port)
    log = open_log(settings)
    ledger = open_ledger(settings)
    host, port = sockets[0].getsockname()[:2]
    where = f"{settings.scheme}://{settings.host}:{port} ({host})"
    say(f"listening on {where}; loading {settings.model}")
    return serve(command, sockets, log, ledger)


def serve(
    command: cli.Command,
    sockets: list[socket.socket],
    log: Log | None,
    ledger: UsageLedger | None,
    share: Share | None = None,
    load_model: Load | None = None,
) -> int:
    """One front end, with an engine of its own or a share in one, by ``loader.load`` or another."""
    serving = Serving(limits=open_limits(command.settings, ledger))
    certificate = open_certificate(command.settings)
    key_file = open_key_file(command.settings)
    app = create_app(command.settings, serving, log, key_file=key_file, ledger=ledger)
    server = HttpServer(
        http_config(app, command.settings, certificate),
        serving,
        drain_s=command.settings.drain_s,
        certificate=certificate,
        has_parent=share is not None,
        on_listening=share.on_listening if share is not None else None,
    )
    loader = Loader(command, serving, server, share, load_model)
    loader.start()
    try:
        server.run(sockets=sockets)
    finally:
        if log is not None:  # after the event loop: what it cut off has its line, too
            log.close()
        if ledger is not None:
            ledger.close()
    if loader.failure is not None:
        raise loader.failure
    if serving.chat is None and loader.is_alive():
        # The loader is a part of a half-built engine and cannot be asked to stop.
        os._exit(server.exit_code)
    # Nothing was loaded and nothing is said: a bug, and the loader has shown its traceback.
    return server.exit_code if serving.chat is not None or loader.interrupted else 1


def http_config(
    app: FastAPI, settings: Settings, certificate: Certificate | None
) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="ochat_serve.event_loop:EventLoop",
        http=protocol(app, settings),
        access_log=False,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_TIMEOUT_S,
        backlog=BACKLOG,
        server_header=False,
        proxy_headers=False,  # middleware.gateway reads them
        ssl_context_factory=None if certificate is None else lambda *_: certificate.context,
    )


def open_limits(settings: Settings, ledger: UsageLedger | None) -> Limits:
    """Where the limits of keys are kept: in Redis, or in this process."""
    used = no_use_before if ledger is None else used_before(LedgerReader(ledger))
    if settings.redis_url is None:
        return MemoryLimits(time.time, periods, used)
    from ochat_serve.redis_limits import RedisLimits

    return RedisLimits(
        settings.redis_url.get_secret_value(),
        periods,
        lease_s=settings.request_timeout_s + LEASE_GRACE_S,
        used_before=used,
    )


def prepare(command: cli.Command) -> None:
    """What comes before the port is bound.  Raises ``StartupError``."""
    if command.title is not None:
        setproctitle.setproctitle(command.title)
    for notice in command.notices:
        say(notice)
    open_certificate(command.settings)
    check_redis(command.settings)
    _allow_many_connections()


def _allow_many_connections() -> None:
    """Every stream is an open file; systems start processes with 1,024 and allow more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def protocol(app: FastAPI, settings: Settings) -> type[HttpProtocol]:
    return HttpProtocol.within(bounds(settings), cors(app, settings).headers_for)


def bounds(settings: Settings) -> Bounds:
    """Of each connection; of all together no more than there can be open files."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = settings.max_connections
    if files != resource.RLIM_INFINITY:
        most = min(most, max(1, files - OTHER_FILES))
    return Bounds(
        header_timeout_s=min(HEADER_TIMEOUT_S, settings.read_timeout_s),
        read_timeout_s=settings.read_timeout_s,
        write_timeout_s=settings.write_timeout_s,
        max_connections=most,
        gateways=settings.forwarded_allow_ips,
    )


def bind_for_each(host: str, port: int, count: int) -> list[list[socket.socket]]:
    """Listening sockets for ``count`` processes: the kernel deals new connections out to them.
    Raises ``StartupError``."""
    # Alone first: sockets that share a port would share it with another server, too.
    probe = bind(host, port)
    port = probe[0].getsockname()[1]
    for bound in probe:
        bound.close()
    return [bind(host, port, shared=True) for _ in range(count)]


def bind(host: str, port: int, *, shared: bool = False) -> list[socket.socket]:
    """Listening sockets on every address of ``host``.  Raises ``StartupError``."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise StartupError(f"--host {host} is not an address of any kind: {error}.") from error
    sockets: list[socket.socket] = []
    problem: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(addresses):
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
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


def check_redis(settings: Settings) -> None:
    """Raises ``StartupError``."""
    if settings.redis_url is None:
        return
    try:
        from ochat_serve.redis_limits import check
    except ImportError as error:
        raise StartupError("--redis-url needs the package redis: pip install redis.") from error
    check(settings.redis_url.get_secret_value())


def open_certificate(settings: Settings) -> Certificate | None:
    """Raises ``StartupError``."""
    if settings.ssl_certfile is None or settings.ssl_keyfile is None:
        return None
    return Certificate(settings.ssl_certfile, settings.ssl_keyfile)


def open_log(settings: Settings, drops: MutableSequence[int] | None = None) -> RequestLog | None:
    """The request log, if there is to be one; it counts lost lines at the end of ``drops``.
    Raises ``StartupError``."""
    if settings.log_file is None:
        return None
    return RequestLog(
        open_log_file(settings.log_file, settings),
        clock=time.monotonic,
        redaction=redaction(settings),
        drops=drops,
        place=-1,
    )


def redaction(settings: Settings) -> Redaction | None:
    return Redaction(settings.log_redact, time.thread_time) if settings.log_redact else None


def open_log_file(path: str, settings: Settings) -> LogFile:
    """Raises ``StartupError``."""
    retention = Retention(
        max_bytes=settings.log_max_mb * 2**20,
        max_age_s=settings.log_max_age_h * 3600,
        max_count=settings.log_max_count,
        total_bytes=settings.log_total_mb * 2**20,
    )
    try:
        return LogFile(path, retention, time.time)
    except BlockingIOError as error:
        raise StartupError(
            f"--log-file {path} is written by another server. Each needs a file of its own."
        ) from error
    except OSError as error:
        raise StartupError(f"--log-file {path} cannot be written: {error.strerror}.") from error
