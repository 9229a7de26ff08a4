"""From a command to a served model, beside the running server; and what happens when it dies."""

import asyncio
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ochat_serve import __version__, cli
from ochat_serve.chat_service import ChatService
from ochat_serve.cli import say
from ochat_serve.errors import StartupError
from ochat_serve.generation import ServedModel
from ochat_serve.http_server import HttpServer
from ochat_serve.self_check import check, expected_answer
from ochat_serve.serving import Serving

if TYPE_CHECKING:  # it imports transformers, which takes seconds
    from ochat_serve.model_source import ModelSource

WATCH_INTERVAL_S = 1
PHASES = ("finding the model", "importing vLLM", "loading the tokenizer", "loading the weights")
CHECKING = "checking the answers"


# command, whom to tell the phases, where an engine to share is -> the model behind the server
Load = Callable[[cli.Command, Callable[[str], None], Mapping[str, Any] | None], ServedModel]


def new_cache_secret() -> bytes:
    """For as long as the engine lives, whose cache ends with it."""
    return secrets.token_bytes(32)


@dataclass(frozen=True)
class Share:
    """A front end's part in an engine that its parent has launched.  With one ``cache_secret`` they
    share its cache, too.  ``on_listening`` tells the parent that the port need not be answered."""

    connection: Mapping[str, Any]
    parent: int
    cache_secret: bytes = field(repr=False)
    on_listening: Callable[[], None]

    @property
    def index(self) -> int:
        index: int = self.connection["client_index"]
        return index


class Loader(threading.Thread):
    """Loads the model into ``serving``, then watches its engine.

    ``failure`` says why the server was ended; None while all is well.  ``interrupted``: a signal
    has ended it before the model was served.
    """

    def __init__(
        self,
        command: cli.Command,
        serving: Serving,
        server: HttpServer,
        share: Share | None = None,
        load_model: Load | None = None,
    ) -> None:
        super().__init__(name="load", daemon=True)
        self.failure: StartupError | None = None
        self.interrupted = False
        self._command = command
        self._serving = serving
        self._server = server
        self._share = share
        self._load = load_model or load
        self._who = f"front end {share.index + 1} " if share else ""
        self._cache_secret = share.cache_secret if share else new_cache_secret()
        self._started_at = time.monotonic()

    def run(self) -> None:
        try:
            served = self._load(
                self._command, self._phase, self._share.connection if self._share else None
            )
            self._server.children.look()
            self._serving.engine = served.engine
            self._check(served)
            self._serving.chat = ChatService(
                served,
                self._command.settings,
                clock=time.monotonic,
                now=time.time,
                limits=self._serving.limits,
                cache_secret=self._cache_secret,
            )
            self._serving.phase = "ready"
            seconds = time.monotonic() - self._started_at
            say(f"{self._who}ready in {seconds:.0f} s; models: {', '.join(served.names)}")
            self._watch(served)
        except StartupError as error:
            self._fail(error)
        except CancelledError:  # the server has ended while the model was asked
            self.interrupted = True
        finally:
            self._server.should_exit = True

    def _fail(self, error: StartupError) -> None:
        if self._server.should_exit:  # by a signal, and this is what came of it
            self.interrupted = True
            return
        self.failure = error
        if self._serving.engine is not None:  # it may hang
            self._server.hurry(1, str(error))

    def _phase(self, name: str) -> None:
        self._serving.phase = name
        if self._share is None:  # otherwise the parent tells, once
            say(f"[{PHASES.index(name) + 1}/{len(PHASES)}] {name} ...")

    def _check(self, served: ServedModel) -> None:
        """Ask the model what is known, if anything is.  Raises ``StartupError``, and
        ``CancelledError`` when the server ends meanwhile."""
        settings = self._command.settings
        expected = expected_answer(
            settings.self_check, settings.model, has_weights=served.engine.info.has_weights
        )
        if expected is None:
            return
        self._serving.phase = CHECKING
        # In the server's event loop, to which the engine will belong.
        answer = asyncio.run_coroutine_threadsafe(
            check(served, expected, settings.stall_s), self._server.loop.result()
        ).result()
        say(f"{self._who}asked {expected.question!r}, the model says {answer!r}")

    def _watch(self, served: ServedModel) -> None:
        """Until the server ends.  Without an engine it is of no use to anybody: it ends too, so
        that whoever supervises it starts a new one."""
        while not self._server.should_exit:
            time.sleep(WATCH_INTERVAL_S)
            reason = self._end_of(served)
            if reason is not None and not self._server.should_exit:
                raise StartupError(reason)

    def _end_of(self, served: ServedModel) -> str | None:
        if served.engine.failure is not None:
            return f"{served.engine.failure} The server ends with it."
        if self._share is not None and os.getppid() != self._share.parent:
            return "The parent process has died. The front end ends with it."
        return None


def prepare_engine(command: cli.Command, phase: Callable[[str], None]) -> tuple["ModelSource", Any]:
    """Find the model, import vLLM, check its flags: the model's source and vLLM's arguments.
    Blocks; raises ``StartupError``."""
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
    from ochat_serve.engine import parse_engine_flags

    args = parse_engine_flags(
        command.engine_flags,
        model=source.path,
        served_model_name=source.names[0],
        context=source.context,
    )
    return source, args


def load(
    command: cli.Command,
    phase: Callable[[str], None],
    connection: Mapping[str, Any] | None = None,
) -> ServedModel:
    """Everything up to the model behind the server; with ``connection`` its engine is shared.
    Blocks; raises ``StartupError``."""
    source, args = prepare_engine(command, phase)
    from ochat_serve.engine import VllmEngine
    from ochat_serve.grammar import Trial, TriedGrammars
    from ochat_serve.prompts import open_prompts

    phase(PHASES[2])
    tokenizer_name = args.tokenizer or source.path
    tokenizer_options = {
        "revision": args.tokenizer_revision or args.revision,
        "trust_remote_code": args.trust_remote_code,
    }
    tokenizer, prompts = open_prompts(
        tokenizer_name,
        source.model_type,
        remember_bytes=int(command.settings.tokenizer_cache_mb * 2**20),
        **tokenizer_options,
    )
    phase(PHASES[3])
    engine = VllmEngine.build(args, tokenizer.token_bytes, connection)
    fingerprint = f"{__version__} {engine.info} {source} {args.dtype} {args.quantization}"
    return ServedModel(
        names=source.names,
        engine=engine,
        prompts=prompts,
        grammars=TriedGrammars(
            Trial(
                tokenizer_name,
                vocab_size=engine.info.vocab_size,
                compact_json=args.structured_outputs_config.disable_any_whitespace,
                options=tokenizer_options,
            )
        ),
        created=int(time.time()),
        owned_by=source.owned_by,
        system_fingerprint="fp_" + hashlib.sha256(fingerprint.encode()).hexdigest()[:10],
    )
