"""The whole server as a process, self-check included, with a scripted engine instead of vLLM.

``--says WORDS`` is the model's answer; without it, it says nothing.  All other flags are the
server's.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from ochat_serve import cli, server
from ochat_serve.errors import StartupError, Unavailable
from ochat_serve.generation import ServedModel
from tests.fakes import ScriptedEngine, Wait, served, words


class Silent(ScriptedEngine):
    async def close(self) -> None:
        cli.say("the engine is closed")


@dataclass
class Failing(ScriptedEngine):
    """When it is closed, who waits for it gets an error, as vLLM's do."""

    def __post_init__(self) -> None:
        self.end = Wait()
        error = Unavailable("The engine has stopped.", code="engine_dead", retry_after_s=1)
        self.script = [self.end, error]

    async def close(self) -> None:
        self.end.go.set()
        for _ in range(10):  # until it has come
            await asyncio.sleep(0)


class Slow(ScriptedEngine):
    """It has to be killed to end, which takes longer than the server looks away."""

    async def close(self) -> None:
        self.failure = "The engine process has died (killed by SIGKILL)."
        await asyncio.sleep(2)


class Hung(ScriptedEngine):
    """It does not end, either."""

    async def close(self) -> None:
        await asyncio.Event().wait()


ENGINES = {"silent": Silent, "failing": Failing, "hung": Hung, "slow": Slow}


def main() -> int:
    flags = argparse.ArgumentParser(allow_abbrev=False)
    flags.add_argument("--says")
    flags.add_argument("--engine", choices=ENGINES, default="silent")
    told, others = flags.parse_known_args()
    engine = ENGINES[told.engine]([Wait()])
    if told.says:
        engine.script = words(*told.says.split("|"))

    def load(command: cli.Command, phase: Callable[[str], None], _: object) -> ServedModel:
        phase("loading the weights")
        return served(engine)

    command = cli.parse(others)
    sockets = server.bind(command.settings.host, command.settings.port)
    log = server.open_log(command.settings)
    try:
        return server.serve(command, sockets, log, None, load_model=load)
    except StartupError as error:
        cli.say(str(error))
        return 1


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
