"""Every error a client can see, and the one body they are all written in.

The class carries what OpenAI's clients act on (status, ``type``, ``code``, ``Retry-After``);
the instance carries the sentence and the parameter it is about.  Nothing here knows HTTP
libraries: L4 turns an ``ApiError`` into a response, ``streaming`` turns one into an event.
"""

from typing import Any, ClassVar

_MAX_SHOWN_DIGITS = 20


class ApiError(Exception):
    """An error with an HTTP status.  ``message`` is one or two sentences for a person."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code
        self.retry_after_s = retry_after_s
        self._headers = headers or {}

    @property
    def headers(self) -> dict[str, str]:
        """Response headers that belong to this error."""
        retry = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        return {**self._headers, **retry}

    def body(self) -> dict[str, Any]:
        """OpenAI's error body: ``{"error": {message, type, param, code}}``."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequest(ApiError):
    """400: the request itself is wrong; sending it again will not help."""

    status = 400
    type = "invalid_request_error"


class UnsupportedParameter(InvalidRequest):
    """400: a field that would change the meaning of the answer and that is not served."""

    default_code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    """400: the prompt alone fills the context."""

    default_code = "context_length_exceeded"

    def __init__(
        self,
        max_model_len: int,
        prompt_tokens: int,
        *,
        at_least: bool = False,
        param: str = "messages",
    ) -> None:
        count = f"at least {prompt_tokens}" if at_least else str(prompt_tokens)
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens. However, your "
            f"{param} resulted in {count} tokens. Please reduce the length of the {param}.",
            param=param,
        )
        self._counted = (max_model_len, prompt_tokens, at_least)

    def about(self, param: str) -> "ContextLengthExceeded":
        """The same of another field: where tokens are counted, nobody knows whose they are."""
        max_model_len, prompt_tokens, at_least = self._counted
        return ContextLengthExceeded(max_model_len, prompt_tokens, at_least=at_least, param=param)


class InvalidApiKey(ApiError):
    """401: no key, or a wrong one."""

    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"www-authenticate": "Bearer"})


class PermissionDenied(ApiError):
    """403: the key is known and may not do this."""

    status = 403
    type = "invalid_request_error"
    default_code = "insufficient_permissions"


class RateLimited(ApiError):
    """429: this key, or address, has used its share for now.  ``code`` says which limit."""

    status = 429
    default_code = "rate_limit_exceeded"


class RequestsLimited(RateLimited):
    """429: too many requests."""

    type = "requests"


class TokensLimited(RateLimited):
    """429: too many tokens."""

    type = "tokens"


class QuotaExceeded(RateLimited):
    """429: nothing is left of a day's or month's tokens."""

    type = "insufficient_quota"
    default_code = "insufficient_quota"


class NotFound(ApiError):
    """404: no such route."""

    status = 404
    type = "invalid_request_error"


class ModelNotFound(NotFound):
    """404: a model that is not served here."""

    default_code = "model_not_found"


class MethodNotAllowed(ApiError):
    """405."""

    status = 405
    type = "invalid_request_error"


class RequestTimeout(ApiError):
    """408: the request came too slowly."""

    status = 408
    type = "invalid_request_error"
    default_code = "request_timeout"


class BodyTooLarge(ApiError):
    """413."""

    status = 413
    type = "invalid_request_error"


class UnsupportedMediaType(ApiError):
    """415: the body is not said to be JSON."""

    status = 415
    type = "invalid_request_error"


class HeadersTooLarge(ApiError):
    """431: the request line and headers together, or their number."""

    status = 431
    type = "invalid_request_error"


class ServerFault(ApiError):
    """500: a bug or a failed generation.  The message never shows internals."""

    def __init__(
        self, message: str = "The server had an error while processing your request."
    ) -> None:
        super().__init__(message)


class Unavailable(ApiError):
    """503: the model is loading, overloaded or gone.  ``code`` says which."""

    status = 503

    def __init__(
        self,
        message: str,
        *,
        code: str,
        retry_after_s: int,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, code=code, retry_after_s=retry_after_s, headers=headers)


class DeadlineExceeded(ApiError):
    """504: the request's own time is over."""

    status = 504
    type = "timeout_error"
    default_code = "deadline_exceeded"


def shortened(number: object) -> str:
    """A number for a sentence: JSON's can have thousands of digits."""
    text = str(number)
    return text if len(text) <= _MAX_SHOWN_DIGITS else f"{text[:_MAX_SHOWN_DIGITS]}..."


class StartupError(Exception):
    """What stops the start.  The text is the one sentence that the user sees."""
