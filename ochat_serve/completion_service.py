"""From a checked completion request to an answer that is ready to begin: a chat without turns.

Everything from the admission on is a chat's: this only makes its prompts and names its shapes.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from ochat_serve.caller import Caller
from ochat_serve.chat import Chat, Wire
from ochat_serve.chat_request import check_sampling, reply_form, sampling_options, temperature_of
from ochat_serve.chat_service import ChatService
from ochat_serve.completion_request import (
    as_chat,
    check_places,
    ignored_here,
    prompts_of,
    refuse_unserved_here,
)
from ochat_serve.completion_streaming import CompletionCollector, CompletionWriter
from ochat_serve.constraint import constraint_of
from ochat_serve.errors import ContextLengthExceeded, InvalidRequest
from ochat_serve.generation import Usage
from ochat_serve.notes import logged, notes
from ochat_serve.protocol.chat import ChatCompletionRequest
from ochat_serve.protocol.completion import CompletionRequest
from ochat_serve.request_log import RequestRecord
from ochat_serve.together import Work, generate_together
from ochat_serve.token_service import as_said, check_token_ids


async def prepare_completion(
    service: ChatService,
    request: CompletionRequest,
    record: RequestRecord,
    caller: Caller,
    timeout_s: float = math.inf,
) -> Chat:
    """Check everything, encode the prompts.  Raises ``ApiError``; starts no work.
    ``timeout_s`` is what the client wants to wait at most."""
    elapsed = service.stopwatch()
    record.user = request.user
    service.accept(request, record, caller)
    refuse_unserved_here(request)
    asked = as_chat(request)
    form = reply_form(asked)
    ignored = ignored_here(request)
    service.refuse_if_strict(ignored)
    check_sampling(asked, service.sampling_limits)
    constraint = constraint_of(asked, service.sampling_limits.template_stop_ids)
    prompts = prompts_of(request)
    n = asked.n or 1
    sampled = n if temperature_of(asked, service.sampling_limits) else 1
    check_places(len(prompts), sampled, service.sampling_limits.max_places)
    salt = service.salt(caller)
    said = as_said(prompt for prompt in prompts if isinstance(prompt, str))
    work = await service.encoded(caller, said, partial(_work, service, request, asked, salt))
    if constraint is not None:
        constraint = await service.served.grammars.checked(constraint, caller.name)
        work = [(ids, replace(each, constraint=constraint)) for ids, each in work]
    options = [each for _, each in work]
    usage = Usage(prompt_tokens=sum(len(token_ids) for token_ids, _ in work))
    record.usage = usage
    record.parameters = logged(options[0], form) | _told(len(prompts), request)
    echoes = await _echoes(service, prompts, n, salt) if request.echo else []
    chat = Chat(
        head=service.reply_head("cmpl", record),
        form=form,
        options=options[0],
        record=record,
        generate=partial(
            generate_together,
            engine=service.served.engine,
            work=work,
            cache_salt=salt,
            usage=usage,
        ),
        run=service.on_terms(caller, options, elapsed, timeout_s),
        drops_first_space=False,  # it is the text's that goes on
        keep_outputs=record.keeps_content,
        choices=len(prompts) * n,
        wire=Wire(
            partial(CompletionWriter, echoes=echoes), partial(CompletionCollector, echoes=echoes)
        ),
    )
    chat.headers |= notes(ignored, asked, min(options, key=lambda each: each.max_tokens))
    return chat


async def _work(
    service: ChatService,
    request: CompletionRequest,
    asked: ChatCompletionRequest,
    salt: str | None,
) -> list[Work]:
    """The token ids of each prompt, and how to sample after them.  Raises ``InvalidRequest``."""
    limits = service.sampling_limits
    work: list[Work] = []
    for prompt in prompts_of(request):
        try:
            if isinstance(prompt, str):
                token_ids = await service.served.prompts.encode(
                    prompt,
                    add_special_tokens=request.add_special_tokens is not False,
                    max_tokens=limits.max_model_len,
                    cache_salt=salt,
                )
            else:
                check_token_ids(prompt, limits.vocab_size, "prompt")
                token_ids = prompt
            if not token_ids:
                raise InvalidRequest("A prompt must have at least one token.", param="prompt")
            work.append((token_ids, sampling_options(asked, limits, len(token_ids))))
        except ContextLengthExceeded as error:
            raise error.about("prompt") from error
    return work


def _told(prompts: int, request: CompletionRequest) -> dict[str, object]:
    """More for the log."""
    told: dict[str, object] = {"prompts": prompts} if prompts > 1 else {}
    return told | ({"echo": True} if request.echo else {})


async def _echoes(
    service: ChatService, prompts: Sequence[str | list[int]], n: int, salt: str | None
) -> list[str]:
    """The text before each choice."""
    decode = service.served.prompts.decode
    texts = [each if isinstance(each, str) else await decode(each, salt) for each in prompts]
    return [text for text in texts for _ in range(n)]
