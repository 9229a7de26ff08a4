"""The entry: ``python -m ochat_serve.openai_api_server``.

vLLM's processes (engines, workers, front ends) import this module again when they start, so at
module level it imports next to nothing.
"""

import os
import signal
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, bind, load, serve.  Returns the exit code: 0, or 1 after one sentence."""
    from ochat_serve import cli
    from ochat_serve.errors import StartupError

    try:
        command = cli.parse(sys.argv[1:] if argv is None else argv)
        for variable in cli.SECRET_VARIABLES:
            os.environ.pop(variable, None)  # not for the engine's processes
        if command.settings.api_server_count > 1:
            from ochat_serve import front_ends

            return front_ends.run(command)
        from ochat_serve import server

        return server.run(command)
    except StartupError as error:
        print(f"ochat_serve: {error}", file=sys.stderr, flush=True)
        return 1


def _nothing_runs_yet(*_: object) -> None:
    os._exit(0)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):  # until the server takes them over
        signal.signal(number, _nothing_runs_yet)
    code = main()
    from ochat_serve.ending import leave

    leave(code)
elif __name__ == "__mp_main__":  # multiprocessing's name for it in those processes
    from ochat_serve.parent import end_with_parent

    end_with_parent()
