"""The server as a process, with a scripted engine instead of vLLM: it starts in a second.

Every answer begins with one word and ends when ``POST /release`` has come.  ``GET /running`` is
the number of those under way.
"""

import argparse
import asyncio
import socket
import subprocess
import sys
from pathlib import Path

import uvicorn

from ochat_serve.app import create_app
from ochat_serve.http_protocol import HttpProtocol
from ochat_serve.http_server import HttpServer
from ochat_serve.settings import Settings
from tests.fakes import ScriptedEngine, Wait, serving, words
from tests.request_log.files import request_log

DEAF = """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: print("asked in vain", flush=True))
time.sleep(600)
"""


class Forgetful(ScriptedEngine):
    """It has a process that nothing but SIGKILL ends, says so, and is left behind."""

    def __init__(self) -> None:
        super().__init__()
        self.process = subprocess.Popen([sys.executable, "-c", DEAF])


class Unwilling(Forgetful):
    """It waits for its process for ever."""

    async def close(self) -> None:
        await asyncio.to_thread(self.process.wait)


ENGINES = {"usual": ScriptedEngine, "forgetful": Forgetful, "unwilling": Unwilling}


def main() -> int:
    flags = argparse.ArgumentParser()
    flags.add_argument("--port", type=int, required=True)
    flags.add_argument("--drain-s", type=float, default=30)
    flags.add_argument("--log-file", required=True)
    flags.add_argument("--has-parent", action="store_true")
    flags.add_argument("--engine", choices=ENGINES, default="usual")
    told = flags.parse_args()
    release = Wait()
    engine = ENGINES[told.engine]()
    engine.script = [*words("Hel", "")[:1], release, *words("lo")]
    state = serving(engine)
    log = request_log(Path(told.log_file))
    app = create_app(Settings(), state, log)
    app.add_api_route("/release", lambda: release.go.set(), methods=["POST"])
    app.add_api_route("/running", lambda: engine.running)
    server = HttpServer(
        uvicorn.Config(app, http=HttpProtocol, log_level="warning"),
        state,
        drain_s=told.drain_s,
        has_parent=told.has_parent,
    )
    server.run(sockets=[socket.create_server(("127.0.0.1", told.port))])
    log.close()
    return server.exit_code


if __name__ == "__main__":
    sys.exit(main())
