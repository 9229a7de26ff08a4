"""One request inside vLLM, as ``generation.Generation``.

``TextGeneration`` is the road of nearly every request: one choice, text only.  It takes the text
where vLLM has decoded it; the objects that vLLM would wrap around every token cost a fifth of the
front end's work.  ``CollectedGeneration`` serves all others through those objects.
"""

from collections.abc import Callable, Sequence
from typing import Any

from vllm.exceptions import VLLMError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine import FinishReason as EngineFinishReason
from vllm.v1.engine.output_processor import RequestOutputCollector, RequestState

from ochat_serve.engine.errors import api_error
from ochat_serve.errors import Unavailable
from ochat_serve.generation import (
    Delta,
    FinishReason,
    PositionLogprobs,
    SamplingOptions,
    TokenLogprob,
    Update,
)

# vLLM's finish reasons that are OpenAI's or mean the same; any other is a failed generation.
FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "repetition": "stop",
}


def finish_reason_of(reason: str) -> FinishReason:
    """OpenAI's word for vLLM's.  Raises ``Unavailable`` for a generation that was given up."""
    known = FINISH_REASONS.get(reason)
    if known is None:
        raise Unavailable(
            "The generation was given up by the engine. Please try again.",
            code="engine_failed",
            retry_after_s=1,
        )
    return known


class _Signal:
    """Stands where vLLM's collector has an asyncio.Event, and calls instead of waking a task."""

    def __init__(self, ready: Callable[[], None]) -> None:
        self.set = ready

    def clear(self) -> None:
        """Nothing is kept: ``set`` is called whenever something has come to an empty collector."""


def _nobody_listens() -> None:
    pass


class TextGeneration:
    """One choice without logprobs.

    Stands in for ``RequestState.make_request_output``, which vLLM calls once a step when a
    request's new tokens are decoded.
    """

    def __init__(self, collector: RequestOutputCollector, state: RequestState) -> None:
        self.finished = False
        self._collector = collector  # now only for the engine's errors
        self._state = state
        self._next_text = state.detokenizer.get_next_output_text
        self._interval = state.stream_interval
        self._ready: Callable[[], None] | None = None
        self._text = ""
        self._num_tokens = 0
        self._taken = False  # whether anything was, so far
        self._waiting = False  # whether there is something that the reader knows of
        self._finish_reason: EngineFinishReason | None = None
        state.make_request_output = self._receive

    def _receive(
        self,
        new_token_ids: Sequence[int],
        pooling_output: None,
        finish_reason: EngineFinishReason | None,
        *_: Any,
        **__: Any,
    ) -> None:
        """Called by vLLM; returns None for "nothing to hand on"."""
        self._text += self._next_text(finish_reason is not None, True)
        self._num_tokens += len(new_token_ids)
        self._finish_reason = finish_reason
        if self._waiting:
            return
        if finish_reason is None and self._taken and self._num_tokens < self._interval:
            return
        self._waiting = True
        if self._ready is not None:
            self._ready()

    def listen(self, ready: Callable[[], None]) -> None:
        self._ready = ready
        self._collector.ready = _Signal(ready)
        if self._waiting or self._collector.output is not None:
            ready()

    def take(self) -> Update | None:
        if self._collector.output is not None:
            _raise_failure(self._collector)
        if not (self._waiting or self._num_tokens):
            return None
        reason = self._finish_reason
        self.finished = reason is not None
        delta = Delta(
            0,
            self._text,
            self._num_tokens,
            None if reason is None else finish_reason_of(str(reason)),
        )
        self._text, self._num_tokens = "", 0
        self._waiting, self._taken = False, True
        return Update((delta,), self._state.num_cached_tokens)

    def close(self) -> None:
        """Let go of vLLM's objects and the reader, or each would keep the others from being
        freed until the garbage collector comes."""
        del self._state.make_request_output
        self._ready = None
        self._collector.ready = _Signal(_nobody_listens)
        self._collector.close()


def _raise_failure(collector: RequestOutputCollector) -> None:
    """What has come although nothing is handed on can only be an error."""
    try:
        collector.get_nowait()
    except (VLLMError, ValueError) as error:
        raise api_error(error) from error


class CollectedGeneration:
    """``generation.Generation`` over vLLM's collector, which merges what nobody takes yet."""

    def __init__(
        self,
        collector: RequestOutputCollector,
        options: SamplingOptions,
        copies: int,
        token_bytes: Callable[[int], bytes],
    ) -> None:
        self.finished = False
        self._collector = collector
        self._copies = copies
        self._top_logprobs = options.logprobs
        self._token_bytes = token_bytes

    def listen(self, ready: Callable[[], None]) -> None:
        self._collector.ready = _Signal(ready)
        if self._collector.output is not None:
            ready()

    def close(self) -> None:
        self._collector.ready = _Signal(_nobody_listens)
        self._collector.close()

    def take(self) -> Update | None:
        try:
            output = self._collector.get_nowait()
        except (VLLMError, ValueError) as error:
            raise api_error(error) from error
        if output is None:
            return None
        self.finished = output.finished
        return self._update(output)

    def _update(self, output: RequestOutput) -> Update:
        deltas = [self._delta(choice) for choice in output.outputs]
        if self._copies > 1:  # every greedy choice is the same choice
            deltas = [
                Delta(index, delta.text, delta.num_tokens, delta.finish_reason, delta.logprobs)
                for delta in deltas
                for index in range(self._copies)
            ]
        return Update(deltas, output.num_cached_tokens or 0)

    def _delta(self, output: CompletionOutput) -> Delta:
        reason = output.finish_reason
        finish_reason = None if reason is None else finish_reason_of(reason)
        top = self._top_logprobs
        logprobs = None if top is None else self._logprobs(output, top)
        return Delta(output.index, output.text, len(output.token_ids), finish_reason, logprobs)

    def _logprobs(self, output: CompletionOutput, top: int) -> list[PositionLogprobs]:
        positions = list(zip(output.token_ids, output.logprobs or (), strict=False))
        if output.finish_reason == "stop" and not isinstance(output.stop_reason, str):
            positions = positions[:-1]  # the stop token is not part of the text
        return [self._position(token_id, logprobs, top) for token_id, logprobs in positions]

    def _position(self, token_id: int, logprobs: dict[int, Any], top: int) -> PositionLogprobs:
        ranked = sorted(logprobs.items(), key=lambda item: item[1].rank)[:top]
        return PositionLogprobs(
            TokenLogprob(self._token_bytes(token_id), logprobs[token_id].logprob),
            tuple(TokenLogprob(self._token_bytes(other), entry.logprob) for other, entry in ranked),
        )
