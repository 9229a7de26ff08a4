"""The port's answers while the engine of several front ends is launched, and none of them runs."""

import threading
from contextlib import suppress
from multiprocessing import Pipe
from socket import socket

import uvicorn

from ochat_serve.app import create_app
from ochat_serve.http_server import GRACE_S
from ochat_serve.named_keys import open_key_file
from ochat_serve.request_log import Log
from ochat_serve.server import http_config, open_certificate, open_limits
from ochat_serve.serving import Serving
from ochat_serve.settings import Settings
from ochat_serve.usage.ledger import UsageLedger


class Meanwhile:
    """The whole server without a model, in a thread, until each front end has sent a message to
    ``listening``.

    For a moment both take connections from the same sockets, so none is refused; a connection gets
    one answer, so none waits for another when this server ends.  ``sockets`` and ``ledger`` are
    closed with it.
    """

    def __init__(
        self,
        settings: Settings,
        sockets: list[list[socket]],
        log: Log | None,
        ledger: UsageLedger | None,
    ) -> None:
        self.serving = Serving(limits=open_limits(settings, ledger))
        self._sockets = sockets
        self._ledger = ledger
        key_file = open_key_file(settings)
        app = create_app(settings, self.serving, log, key_file=key_file, ledger=ledger)
        config = http_config(app, settings, open_certificate(settings))
        config.headers = [("connection", "close")]
        config.timeout_graceful_shutdown = GRACE_S
        self._server = uvicorn.Server(config)
        self._heard, self.listening = Pipe(duplex=False)
        self._thread = threading.Thread(target=self._serve, name="meanwhile", daemon=True)

    def start(self) -> None:
        self._thread.start()
        threading.Thread(target=self._hand_over, name="hand-over", daemon=True).start()

    def end(self) -> None:
        self._server.should_exit = True
        self._thread.join(2 * GRACE_S)

    def _serve(self) -> None:
        self._server.run([each for sockets in self._sockets for each in sockets])
        if self._ledger is not None:
            self._ledger.close()

    def _hand_over(self) -> None:
        with suppress(EOFError, OSError):
            for _ in self._sockets:
                self._heard.recv_bytes()
        self._server.should_exit = True
