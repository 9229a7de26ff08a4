"""What a completion request means, in a chat's terms: one set of rules for sampling."""

from collections.abc import Mapping
from types import MappingProxyType

from ochat_serve.chat_request import REFUSED, Harmless, first_refused, named, unknown_fields
from ochat_serve.errors import InvalidRequest, UnsupportedParameter
from ochat_serve.protocol.chat import ChatCompletionRequest
from ochat_serve.protocol.completion import CompletionRequest
from ochat_serve.protocol.sampling import SamplingRequest

# OpenAI's, of this endpoint only.
DEFAULT_MAX_TOKENS = 16
# Extra fields that would change the answer, as in a chat.  ``best_of`` is a field here.
REFUSED_HERE: Mapping[str, Harmless] = MappingProxyType(
    {name: harmless for name, harmless in REFUSED.items() if name != "best_of"}
    | {
        "prompt_embeds": lambda value: False,
        "truncate_prompt_tokens": lambda value: False,
    }
)


def refuse_unserved_here(request: CompletionRequest) -> None:
    """Raises ``InvalidRequest`` for what would change the answer and is not served."""
    name = first_refused(request.model_extra or {}, REFUSED_HERE)
    if name is None and request.suffix:
        name = "suffix"
    if name is not None:
        raise UnsupportedParameter(f"This server does not support '{name}'.", param=name)
    if request.best_of is not None and request.best_of > (request.n or 1):
        raise UnsupportedParameter(
            "This server makes no more choices than it returns: 'best_of' must be at most 'n'.",
            param="best_of",
        )
    if request.echo and request.logprobs is not None:
        raise UnsupportedParameter(
            "Setting 'echo' and 'logprobs' at the same time is not supported: this server gives "
            "log probabilities of what it generates only.",
            param="logprobs",
        )


def ignored_here(request: CompletionRequest) -> list[str]:
    """Names of the given fields that have no effect.  Raises ``InvalidRequest`` for too many."""
    names = unknown_fields(request) - REFUSED_HERE.keys()
    if request.stream_options is not None:
        names |= {f"stream_options.{name}" for name in unknown_fields(request.stream_options)}
    return named(names)


def as_chat(request: CompletionRequest) -> ChatCompletionRequest:
    """The same model, sampling and form of answer, without a conversation."""
    shared = {name: getattr(request, name) for name in SamplingRequest.model_fields}
    if request.max_tokens is None:
        shared["max_tokens"] = DEFAULT_MAX_TOKENS
    return ChatCompletionRequest.model_construct(
        **shared,
        messages=[],
        logprobs=request.logprobs is not None,
        top_logprobs=request.logprobs,
    )


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """Each prompt, as text or as token ids."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [[token_id for token_id in prompt if isinstance(token_id, int)]]
    return [each for each in prompt if not isinstance(each, int)]


def check_places(prompts: int, n: int, most: int) -> None:
    """Raises ``InvalidRequest`` for more choices than the engine would ever be given at once."""
    if prompts * n > most:
        raise InvalidRequest(
            f"This request asks for {prompts} x {n} choices; this server makes at most {most} at a "
            "time.",
            param="prompt" if prompts > 1 else "n",
            code="invalid_value",
        )
