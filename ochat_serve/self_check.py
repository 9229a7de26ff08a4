"""Whether the model talks sense, asked at start, before anybody else may ask.

A switch that does not fit (precision, compilation, quantization, a prompt format) breaks a model
without any error: it answers nonsense, fluently and with status 200.  So one question with a
known answer takes the road of every request, from the text to the engine and back.
"""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ochat_serve.errors import ApiError, StartupError
from ochat_serve.generation import ChatTurn, Conversation, SamplingOptions, ServedModel
from ochat_serve.setting_values import DEMO, SelfCheck
from ochat_serve.templates.registry import model_type_of_name

# The demo model's answer has eight tokens; others are talkative.
MAX_TOKENS = 32
# Nobody's: no request finds in the cache what is computed for the check.
CACHE_SALT = "self-check"
_SHOWN_CHARS = 200


@dataclass(frozen=True, slots=True)
class KnownAnswer:
    """``word`` is in every right answer: later tokens differ between machines and precisions."""

    question: str
    word: str

    def is_in(self, text: str) -> bool:
        """Whether ``text`` has the word, and does not say the same few over and over."""
        words = re.findall(r"\w+", text.casefold())
        goes_round = 2 * len(set(words)) < len(words)
        return self.word.casefold() in words and not goes_round


# Any chat model that knows English knows it, however small.
CAPITAL = KnownAnswer("What is the capital of France?", "Paris")
# The embedded model, and those that are OpenChat's by their names: a file of the folder tells
# the prompt format only, and models trained further for other things have it, too.
KNOWN_ANSWERS: Mapping[str, KnownAnswer] = MappingProxyType(
    {
        DEMO: CAPITAL,
        "openchat_3.6": CAPITAL,
        "openchat_3.5": CAPITAL,
        "gemma": CAPITAL,
        "openchat_v3.2": CAPITAL,
    }
)


def expected_answer(self_check: SelfCheck, model: str, *, has_weights: bool) -> KnownAnswer | None:
    """What to ask ``model`` (as ``--model`` names it), None for nothing."""
    known = KNOWN_ANSWERS.get(model if model == DEMO else model_type_of_name(Path(model).name))
    if self_check == "auto":
        return known if has_weights else None
    return (known or CAPITAL) if self_check == "on" else None


async def check(served: ServedModel, expected: KnownAnswer, patience_s: float) -> str:
    """Ask, greedily: the answer.  Raises ``StartupError`` for a wrong one, for an engine that
    fails, and for one that makes no token in ``patience_s``."""
    asked = f"The self-check failed: asked {expected.question!r}, "
    try:
        text = await _ask(served, expected.question, patience_s)
    except TimeoutError as error:
        raise StartupError(
            f"{asked}the engine made no token in {patience_s:g} seconds. If the machine is that "
            "slow, --stall-s must be longer; --self-check off does not ask."
        ) from error
    except ApiError as error:
        reason = served.engine.failure or error.message
        raise StartupError(f"{asked}the engine failed: {reason}") from error
    if not expected.is_in(text):
        raise StartupError(
            f"{asked}the model says {text[:_SHOWN_CHARS]!r} and not {expected.word!r}. Look at "
            "--enforce-eager, --dtype, --quantization and --model-type; with --self-check off it "
            "is served all the same."
        )
    return text


async def _ask(served: ServedModel, question: str, patience_s: float) -> str:
    """The answer.  Raises ``ApiError``, and ``TimeoutError`` for ``patience_s`` without a
    token."""
    text = ""
    loop = asyncio.get_running_loop()
    options = SamplingOptions(
        max_tokens=MAX_TOKENS, temperature=0, stop_token_ids=served.prompts.stop_token_ids
    )
    conversation = Conversation((ChatTurn("user", question),))
    async with asyncio.timeout(patience_s) as patience:
        prompt = await served.prompts.render(
            conversation, served.engine.info.max_model_len, CACHE_SALT
        )
        async with served.engine.generate(CACHE_SALT, prompt, options, CACHE_SALT) as generation:
            ready = asyncio.Event()
            generation.listen(ready.set)
            while not generation.finished:
                await ready.wait()
                ready.clear()
                if (update := generation.take()) is None:
                    continue
                patience.reschedule(loop.time() + patience_s)
                text += "".join(delta.text for delta in update.deltas)
    return text.strip()
