"""vLLM's errors, translated once."""

from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.v1.engine.exceptions import EngineDeadError

from ochat_serve.errors import ApiError, InvalidRequest, ServerFault, Unavailable


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
