"""What a chat request means: conversation, sampling, form of the answer.

Everything that can be refused without the model is refused here, before any text is encoded.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from ochat_serve.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    UnsupportedParameter,
    shortened,
)
from ochat_serve.generation import ChatTurn, Conversation, SamplingOptions
from ochat_serve.protocol.caps import MAX_TOOLS, MAX_UNKNOWN_FIELDS
from ochat_serve.protocol.chat import ChatCompletionRequest, ChatMessage

Harmless = Callable[[Any], bool]


def _only(*values: Any) -> Harmless:
    return lambda value: any(value == harmless for harmless in values)


# Fields that would change the answer and are not served, with the values that change nothing.
REFUSED: Mapping[str, Harmless] = MappingProxyType(
    {
        "allowed_token_ids": _only(),
        "audio": _only(),
        "bad_words": _only([]),
        "best_of": _only(1),
        "chat_template": _only(),
        "chat_template_kwargs": _only({}),
        "function_call": _only("none"),
        "functions": _only([]),
        "guided_choice": _only(),
        "guided_grammar": _only(),
        "guided_json": _only(),
        "guided_regex": _only(),
        "modalities": _only(["text"]),
        "moderation": _only(),
        "prompt_logprobs": _only(),
        "reasoning_effort": _only("none"),
        "store": _only(False),
        "tool_choice": _only("none"),
        "use_beam_search": _only(False),
        "verbosity": _only("medium"),
        "web_search_options": _only(),
    }
)
REFUSED_IN_MESSAGES: Mapping[str, Harmless] = MappingProxyType(
    {"audio": _only(), "function_call": _only(), "tool_calls": _only([])}
)
MAX_NAMED_IGNORED = 20
MAX_TOKEN_DIGITS = 9


@dataclass(frozen=True, slots=True)
class ReplyForm:
    """How the answer is to be sent."""

    stream: bool = False
    include_usage: bool = False
    include_obfuscation: bool = False
    metadata: dict[str, str] | None = None


def refuse_unserved(request: ChatCompletionRequest) -> None:
    """400 for fields that would change the answer.  Raises ``UnsupportedParameter``, or
    ``InvalidRequest`` for more of them than even an unserved field may hold."""
    extra = request.model_extra or {}
    tools = extra.get("tools")
    if isinstance(tools, list) and len(tools) > MAX_TOOLS:
        raise InvalidRequest(
            f"Invalid value for 'tools': must have at most {MAX_TOOLS} items, not {len(tools)}.",
            param="tools",
            code="invalid_value",
        )
    if (name := first_refused(extra, REFUSED)) is not None:
        raise UnsupportedParameter(f"This server does not support '{name}'.", param=name)
    if tools is not None and extra.get("tool_choice") != "none":
        raise UnsupportedParameter("This server does not support 'tools'.", param="tools")
    for position, message in enumerate(request.messages):
        if (name := first_refused(message.model_extra or {}, REFUSED_IN_MESSAGES)) is not None:
            raise UnsupportedParameter(
                f"This server does not support '{name}' in messages.",
                param=f"messages.[{position}].{name}",
            )


def first_refused(given: Mapping[str, Any], table: Mapping[str, Harmless]) -> str | None:
    """The first of ``table`` that was given with a value that is not harmless."""
    if not given:
        return None
    return next(
        (
            name
            for name, harmless in table.items()
            if (value := given.get(name)) is not None and not harmless(value)
        ),
        None,
    )


def ignored_fields(request: ChatCompletionRequest, *, uses_condition: bool) -> list[str]:
    """Names of the given fields that have no effect, sorted, at most ``MAX_NAMED_IGNORED``.

    Raises ``InvalidRequest`` for more of them than a request may have.
    """
    # What is refused otherwise was given with a value that changes nothing.
    names = unknown_fields(request) - REFUSED.keys()
    if request.stream_options is not None:
        names |= {f"stream_options.{name}" for name in unknown_fields(request.stream_options)}
    for message in request.messages:
        names |= {
            f"messages.{name}" for name in unknown_fields(message) - REFUSED_IN_MESSAGES.keys()
        }
        for part in message.content if isinstance(message.content, list) else ():
            names |= {f"messages.content.{name}" for name in unknown_fields(part)}
    if request.condition and not uses_condition:
        names.add("condition")
    return named(names)


def named(names: Set[str]) -> list[str]:
    """Fields without effect, sorted, as many as are told.  Raises ``InvalidRequest`` for more of
    them than a request may have."""
    if len(names) > MAX_UNKNOWN_FIELDS:
        raise InvalidRequest(
            f"The request has {len(names)} fields that this server does not know; it takes at "
            f"most {MAX_UNKNOWN_FIELDS}.",
            code="unknown_parameter",
        )
    return sorted(names)[:MAX_NAMED_IGNORED]


def unknown_fields(model: BaseModel) -> set[str]:
    """Names of the fields that ``model`` does not know and that are not null."""
    extra = model.model_extra
    return {name for name, value in extra.items() if value is not None} if extra else set()


def conversation(request: ChatCompletionRequest) -> Conversation:
    """The messages as checked text.  Raises ``InvalidRequest``."""
    turns = tuple(_turn(position, message) for position, message in enumerate(request.messages))
    return Conversation(turns, request.condition or "")


def _turn(position: int, message: ChatMessage) -> ChatTurn:
    content = message.content
    if content is None:
        raise InvalidRequest(
            f"Invalid value for 'messages.[{position}].content': must be a string or a list of "
            "text parts, not null.",
            param=f"messages.[{position}].content",
        )
    if not isinstance(content, str):
        content = "\n".join(part.text if part.type == "text" else part.refusal for part in content)
    role = "system" if message.role == "developer" else message.role
    return ChatTurn(role, content)


def reply_form(request: ChatCompletionRequest) -> ReplyForm:
    """Raises ``InvalidRequest`` for stream options without a stream."""
    options = request.stream_options
    if options is not None and not request.stream:
        raise InvalidRequest(
            "'stream_options' is only allowed when 'stream' is true.", param="stream_options"
        )
    return ReplyForm(
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        include_obfuscation=bool(options and options.include_obfuscation),
        metadata=request.metadata,
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """What the model and the settings allow.  ``max_places`` are the choices that can be in the
    engine at a time; ``stream_interval`` is for streamed answers."""

    max_model_len: int
    vocab_size: int
    max_n: int
    max_places: int
    default_temperature: float
    template_stop_ids: tuple[int, ...]
    stream_interval: int


# A one-body answer needs no deltas in between; this many tokens keep the count of an
# abandoned request honest and cost nothing.
ONE_BODY_INTERVAL = 32


def check_sampling(request: ChatCompletionRequest, limits: Limits) -> None:
    """Everything about sampling that types and ranges cannot say.  Raises ``InvalidRequest``."""
    # Greedy choices are copies of one.
    most = min(limits.max_n, limits.max_places) if temperature_of(request, limits) else limits.max_n
    if (request.n or 1) > most:
        raise InvalidRequest(
            f"Invalid value for 'n': this server makes at most {most} choices, not "
            f"{shortened(request.n)}.",
            param="n",
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest(
            "'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs"
        )
    for token in request.logit_bias or ():
        is_number = token.isascii() and token.isdigit() and len(token) <= MAX_TOKEN_DIGITS
        if not is_number or int(token) >= limits.vocab_size:
            raise InvalidRequest(
                f"Invalid key in 'logit_bias': {token[:40]!r} is not a token id below "
                f"{limits.vocab_size}.",
                param="logit_bias",
            )
    for token_id in request.stop_token_ids or ():
        if token_id >= limits.vocab_size:
            raise InvalidRequest(
                f"Invalid value for 'stop_token_ids': {token_id} is not a token id below "
                f"{limits.vocab_size}.",
                param="stop_token_ids",
            )
    ceiling = request.max_completion_tokens or request.max_tokens
    if ceiling and (request.min_tokens or 0) > ceiling:
        raise InvalidRequest(
            f"'min_tokens' ({request.min_tokens}) is larger than the most tokens allowed "
            f"({ceiling}).",
            param="min_tokens",
        )


def temperature_of(request: ChatCompletionRequest, limits: Limits) -> float:
    """0.0 is greedy: all choices are copies of one."""
    if request.top_p == 0:  # the smallest nucleus is the likeliest token
        return 0.0
    return limits.default_temperature if request.temperature is None else request.temperature


def sampling_options(
    request: ChatCompletionRequest, limits: Limits, prompt_tokens: int
) -> SamplingOptions:
    """Sampling for a prompt of ``prompt_tokens`` tokens.

    ``max_tokens`` is a ceiling: more than the room left is cut to it.  Raises
    ``ContextLengthExceeded`` when there is no room at all.
    """
    room = limits.max_model_len - prompt_tokens
    if room < 1:
        raise ContextLengthExceeded(limits.max_model_len, prompt_tokens)
    max_tokens = min(request.max_completion_tokens or request.max_tokens or room, room)
    if (request.min_tokens or 0) > max_tokens:
        raise InvalidRequest(
            f"'min_tokens' ({request.min_tokens}) is larger than the room left ({room} tokens).",
            param="min_tokens",
        )
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    template_stops = () if request.ignore_eos else limits.template_stop_ids
    return SamplingOptions(
        max_tokens=max_tokens,
        n=request.n or 1,
        temperature=temperature_of(request, limits),
        top_p=request.top_p or 1.0,
        top_k=max(request.top_k or 0, 0),
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        min_tokens=request.min_tokens or 0,
        seed=request.seed,
        stop=stop,
        stop_token_ids=tuple(dict.fromkeys((*template_stops, *(request.stop_token_ids or ())))),
        ignore_eos=bool(request.ignore_eos),
        skip_special_tokens=request.skip_special_tokens is not False,
        logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()} or None,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        stream_interval=limits.stream_interval if request.stream else ONE_BODY_INTERVAL,
    )
