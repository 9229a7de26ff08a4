"""Every error that a client can see: one row per class, in the words of the API."""

from collections.abc import Iterator

import pytest

from ochat_serve.errors import (
    ApiError,
    BodyTooLarge,
    ContextLengthExceeded,
    DeadlineExceeded,
    HeadersTooLarge,
    InvalidApiKey,
    InvalidRequest,
    MethodNotAllowed,
    ModelNotFound,
    NotFound,
    PermissionDenied,
    QuotaExceeded,
    RateLimited,
    RequestsLimited,
    RequestTimeout,
    ServerFault,
    StartupError,
    TokensLimited,
    Unavailable,
    UnsupportedMediaType,
    UnsupportedParameter,
)

# error, status, type, code, param, headers
TABLE: list[tuple[ApiError, int, str, str | None, str | None, dict[str, str]]] = [
    (ApiError("x"), 500, "server_error", None, None, {}),
    (InvalidRequest("x"), 400, "invalid_request_error", None, None, {}),
    (
        InvalidRequest("x", param="n", code="invalid_value"),
        400,
        "invalid_request_error",
        "invalid_value",
        "n",
        {},
    ),
    (
        UnsupportedParameter("x", param="tools"),
        400,
        "invalid_request_error",
        "unsupported_parameter",
        "tools",
        {},
    ),
    (
        ContextLengthExceeded(8192, 9000),
        400,
        "invalid_request_error",
        "context_length_exceeded",
        "messages",
        {},
    ),
    (
        InvalidApiKey("x"),
        401,
        "invalid_request_error",
        "invalid_api_key",
        None,
        {"www-authenticate": "Bearer"},
    ),
    (
        PermissionDenied("x"),
        403,
        "invalid_request_error",
        "insufficient_permissions",
        None,
        {},
    ),
    (NotFound("x"), 404, "invalid_request_error", None, None, {}),
    (
        ModelNotFound("x", param="model"),
        404,
        "invalid_request_error",
        "model_not_found",
        "model",
        {},
    ),
    (
        MethodNotAllowed("x", headers={"allow": "POST"}),
        405,
        "invalid_request_error",
        None,
        None,
        {"allow": "POST"},
    ),
    (
        RateLimited("x", retry_after_s=3),
        429,
        "server_error",
        "rate_limit_exceeded",
        None,
        {"retry-after": "3"},
    ),
    (RequestsLimited("x"), 429, "requests", "rate_limit_exceeded", None, {}),
    (TokensLimited("x"), 429, "tokens", "rate_limit_exceeded", None, {}),
    (QuotaExceeded("x"), 429, "insufficient_quota", "insufficient_quota", None, {}),
    (DeadlineExceeded("x"), 504, "timeout_error", "deadline_exceeded", None, {}),
    (RequestTimeout("x"), 408, "invalid_request_error", "request_timeout", None, {}),
    (HeadersTooLarge("x"), 431, "invalid_request_error", None, None, {}),
    (BodyTooLarge("x"), 413, "invalid_request_error", None, None, {}),
    (UnsupportedMediaType("x"), 415, "invalid_request_error", None, None, {}),
    (ServerFault(), 500, "server_error", None, None, {}),
    (
        Unavailable("x", code="loading", retry_after_s=5),
        503,
        "server_error",
        "loading",
        None,
        {"retry-after": "5"},
    ),
    (
        Unavailable("x", code="overloaded", retry_after_s=0),
        503,
        "server_error",
        "overloaded",
        None,
        {"retry-after": "0"},
    ),
    (
        ApiError("x", retry_after_s=1, headers={"connection": "close"}),
        500,
        "server_error",
        None,
        None,
        {"connection": "close", "retry-after": "1"},
    ),
]


def kinds(kind: type[ApiError] = ApiError) -> Iterator[type[ApiError]]:
    """Those of ``errors``: others are one of them with words of their own."""
    yield kind
    for narrower in kind.__subclasses__():
        if narrower.__module__ == ApiError.__module__:
            yield from kinds(narrower)


def test_every_class_has_a_row():
    assert {type(row[0]) for row in TABLE} == set(kinds())


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param", "headers"),
    TABLE,
    ids=lambda value: type(value).__name__ if isinstance(value, ApiError) else "",
)
def test_what_a_client_is_told(
    error: ApiError,
    status: int,
    kind: str,
    code: str | None,
    param: str | None,
    headers: dict[str, str],
):
    assert (error.status, error.headers) == (status, headers)
    assert error.body() == {
        "error": {"message": str(error), "type": kind, "param": param, "code": code}
    }
    assert error.message == str(error)


def test_too_long_says_both_numbers_in_the_words_that_clients_look_for():
    assert ContextLengthExceeded(8192, 9000).message == (
        "This model's maximum context length is 8192 tokens. However, your messages resulted in "
        "9000 tokens. Please reduce the length of the messages."
    )


def test_a_fault_of_ours_tells_nothing_of_the_inside():
    assert ServerFault().message == "The server had an error while processing your request."


def test_what_stops_the_start_is_no_answer():
    """Or an error handler of the app could send it to a client."""
    assert not issubclass(StartupError, ApiError)
    assert str(StartupError("One sentence.")) == "One sentence."
