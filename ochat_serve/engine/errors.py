"""vLLM's errors, translated once."""

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.v1.engine.exceptions import EngineDeadError

from ochat_serve.errors import ApiError, InvalidRequest, ServerFault, StartupError, Unavailable

# What a bad configuration or model makes vLLM raise; anything else is a bug and shows itself.
_START_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AssertionError,
    ImportError,
)


def api_error(error: Exception) -> ApiError:
    """What a client is told of an error of vLLM's.  First match wins."""
    if isinstance(error, EngineDeadError):
        return Unavailable(
            "The engine has stopped, and the server ends with it.",
            code="engine_dead",
            retry_after_s=10,
        )
    if isinstance(error, GracefulHTTPError):
        return Unavailable(error.message, code="overloaded", retry_after_s=1)
    if isinstance(error, VLLMClientError | ValueError):
        message = str(error.args[0]) if error.args else "The model refuses this request."
        return InvalidRequest(message, param=getattr(error, "parameter", None))
    return ServerFault()


@contextmanager
def startup_errors(model: str) -> Iterator[None]:
    """What stops vLLM's start becomes ``StartupError``: one sentence."""
    try:
        yield
    except _START_ERRORS as error:
        raise StartupError(f"vLLM cannot serve {model}: {first_sentence(error)}") from error


def first_sentence(error: Exception) -> str:
    """The cause in one line.  pydantic's errors say it on their third."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ValidationError) and len(lines) > 2:
        where, what = lines[1], lines[2].removeprefix("Value error, ").split(" [type=")[0]
        return what if what[:1].isupper() and "Input" not in what else f"{where}: {what}"
    return lines[0] if lines else type(error).__name__
