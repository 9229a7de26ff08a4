"""From a checked request to a chat that is ready to begin.

Whatever can be refused is refused in ``ChatService.prepare``, before any work has started.
"""

import hmac
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import shortuuid

from ochat_serve.chat import Chat
from ochat_serve.chat_request import (
    Limits,
    ReplyForm,
    check_sampling,
    conversation,
    ignored_fields,
    refuse_unserved,
    reply_form,
    sampling_options,
)
from ochat_serve.errors import InvalidRequest, ModelNotFound
from ochat_serve.generation import SamplingOptions, ServedModel, Usage
from ochat_serve.protocol.chat import ChatCompletionRequest
from ochat_serve.request_log import RequestRecord
from ochat_serve.settings import Settings
from ochat_serve.streaming import ReplyHead

IGNORED_HEADER = "x-ochat-ignored"
MAX_TOKENS_HEADER = "x-ochat-max-tokens"

_DEFAULTS = asdict(SamplingOptions(max_tokens=0))
del _DEFAULTS["stream_interval"]  # the server's choice, not the client's
_TOLD_BY_NUMBER = frozenset({"stop", "logit_bias", "stop_token_ids"})


class ChatService:
    """Answers chat requests with one model.  ``clock`` gives seconds from any fixed point,
    ``now`` Unix seconds.  ``cache_secret``: see ``cache_salt``."""

    def __init__(
        self,
        served: ServedModel,
        settings: Settings,
        *,
        clock: Callable[[], float],
        now: Callable[[], float],
        cache_secret: bytes,
        log_content: bool = False,
    ) -> None:
        self.served = served
        self._cache_secret = cache_secret
        self._strict = settings.strict_parameters
        self._log_content = log_content
        self._clock = clock
        self._now = now
        temperature = settings.default_temperature
        self._limits = Limits(
            max_model_len=served.engine.info.max_model_len,
            vocab_size=served.engine.info.vocab_size,
            max_n=settings.max_n,
            default_temperature=(
                served.prompts.default_temperature if temperature is None else temperature
            ),
            template_stop_ids=served.prompts.stop_token_ids,
            stream_interval=settings.stream_interval,
        )

    async def prepare(self, request: ChatCompletionRequest, record: RequestRecord) -> Chat:
        """Check everything, render the prompt.  Raises ``ApiError``; starts no work."""
        arrived = self._clock()
        record.user = request.user or request.safety_identifier
        record.metadata = request.metadata
        record.model = self._model_name(request.model)
        if self._log_content:
            record.request = json.loads(request.model_dump_json(exclude_unset=True))
        refuse_unserved(request)
        form = reply_form(request)
        ignored = ignored_fields(request, uses_condition=self.served.prompts.uses_condition)
        if ignored and self._strict:
            raise InvalidRequest(
                f"Unrecognized request argument supplied: {_printable(ignored)}.",
                param=ignored[0][:64],
                code="unknown_parameter",
            )
        check_sampling(request, self._limits)
        prompt = conversation(request)
        salt = cache_salt(self._cache_secret, record.key)
        prompt_token_ids = await self.served.prompts.render(
            prompt, self._limits.max_model_len, salt
        )
        record.usage = Usage(prompt_tokens=len(prompt_token_ids))
        options = sampling_options(request, self._limits, len(prompt_token_ids))
        record.parameters = _logged(options, form)
        chat = Chat(
            head=ReplyHead(
                id=f"chatcmpl-{shortuuid.uuid()}",
                created=int(self._now()),
                model=record.model,
                system_fingerprint=self.served.system_fingerprint,
            ),
            form=form,
            options=options,
            record=record,
            generate=partial(
                self.served.engine.generate,
                prompt_token_ids=prompt_token_ids,
                options=options,
                cache_salt=salt,
            ),
            drops_first_space=self.served.prompts.begins_with_space and not prompt.continues,
            elapsed=lambda: self._clock() - arrived,
            keep_outputs=self._log_content,
        )
        record.id = chat.head.id
        chat.headers |= _notes(ignored, request, options)
        return chat

    def _model_name(self, model: str | None) -> str:
        """The name to answer with.  Raises ``ModelNotFound`` for a model not served here."""
        names = self.served.names
        if not model:
            return names[0]
        if model in names:
            return model
        raise ModelNotFound(
            f"The model `{model[:100]}` does not exist. This server has: "
            f"{', '.join(f'`{name}`' for name in names)}.",
            param="model",
        )


def cache_salt(secret: bytes, key: str | None) -> str | None:
    """What keeps a key's cached prompts from serving others: whoever shares a cache can tell by
    the time to the first token what another has asked.  Not to be guessed without the secret, and
    not the client's to choose; None without keys, where all are one."""
    return None if key is None else hmac.digest(secret, key.encode(), "sha256").hex()


def _notes(
    ignored: list[str], request: ChatCompletionRequest, options: SamplingOptions
) -> dict[str, str]:
    """Response headers that say what was not done as asked."""
    notes = {}
    if ignored:
        notes[IGNORED_HEADER] = _printable(ignored)
    asked = request.max_completion_tokens or request.max_tokens
    if asked is not None and asked > options.max_tokens:
        notes[MAX_TOKENS_HEADER] = str(options.max_tokens)
    return notes


def _printable(names: list[str]) -> str:
    """A field name can be anything; a header value cannot."""
    short = [name[:64].encode("ascii", "replace").decode() for name in names]
    return ", ".join(re.sub(r"[^ -~]", "?", name) for name in short)


def _logged(options: SamplingOptions, form: ReplyForm) -> dict[str, object]:
    """The parameters in the log: those that differ from the defaults.  Stop strings and biases
    may hold what a user said: only their number is told."""
    logged: dict[str, object] = {
        name: len(value) if name in _TOLD_BY_NUMBER else value
        for name, default in _DEFAULTS.items()
        if (value := getattr(options, name)) != default
    }
    return logged | ({"stream": True} if form.stream else {})
