"""``POST /v1/completions``: the request's own fields; see ``sampling`` for all others."""

from typing import Annotated

from pydantic import Field, PlainValidator

from ochat_serve.protocol.caps import MAX_LOGPROBS
from ochat_serve.protocol.prompts import prompt
from ochat_serve.protocol.sampling import SamplingRequest

Prompt = Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(prompt)]


class CompletionRequest(SamplingRequest):
    """The body of a completion request."""

    prompt: Prompt

    # Sampling
    best_of: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    # The answer's form
    echo: bool | None = None
    suffix: str | None = None

    # Extensions
    add_special_tokens: bool | None = None
