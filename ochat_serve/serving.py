"""What is being served at this moment: nothing yet, a model, or nothing any more."""

import asyncio
import time
from dataclasses import dataclass, field

from ochat_serve.chat_service import ChatService
from ochat_serve.clock import periods
from ochat_serve.errors import Unavailable
from ochat_serve.generation import Engine
from ochat_serve.limits import Limits, MemoryLimits
from ochat_serve.nudge import Nudge

RETRY_S = 5
ENGINE_RETRY_S = 10
_IDLE_S = 1.0


@dataclass
class Serving:
    """The app's one piece of changing state.  ``phase`` is a word or two for people; ``engine``
    is there before ``chat``, while its answers are checked; ``reload`` has the files that are
    followed read now."""

    phase: str = "starting"
    chat: ChatService | None = None
    draining: bool = False
    limits: Limits = field(default_factory=lambda: MemoryLimits(time.time, periods))
    engine: Engine | None = None
    reload: Nudge = field(default_factory=Nudge)

    def require_loaded(self) -> ChatService:
        """The service, whether it can answer now or not.  Raises ``Unavailable`` before."""
        if self.chat is None:
            raise self._loading()
        return self.chat

    def require_chat(self) -> ChatService:
        """The service, if it can answer now.  Raises ``Unavailable``."""
        trouble = self.trouble
        if trouble is not None:
            raise trouble
        assert self.chat is not None
        return self.chat

    @property
    def trouble(self) -> Unavailable | None:
        """Why requests cannot be answered now, or None."""
        if self.chat is None:
            return self._loading()
        failure = self.chat.served.engine.failure
        if failure is not None:
            return Unavailable(failure, code="engine_dead", retry_after_s=ENGINE_RETRY_S)
        if self.draining:
            return Unavailable(
                "The server is shutting down and takes no new requests.",
                code="draining",
                retry_after_s=RETRY_S,
                headers={"connection": "close"},
            )
        if self.chat.health.stalled:
            return Unavailable(
                f"The engine has made no step and has not answered for "
                f"{self.chat.health.stall_s:g} seconds.",
                code="stalled",
                retry_after_s=ENGINE_RETRY_S,
            )
        return None

    def give_up(self) -> int:
        """Fail every chat that still runs, because the server ends.  Their number."""
        if self.chat is None:
            return 0
        running = self.chat.running
        count = len(running)
        failure = self.chat.served.engine.failure
        running.fail(
            Unavailable(
                failure or "The server is shutting down before the answer was finished.",
                code="engine_dead" if failure else "shutting_down",
                retry_after_s=ENGINE_RETRY_S if failure else RETRY_S,
            )
        )
        return count

    async def close(self) -> None:
        """End the engine, if there is one, and what tries grammars out."""
        if self.chat is not None:
            await self.chat.served.grammars.close()
        engine = self.chat.served.engine if self.chat is not None else self.engine
        if engine is not None:
            await engine.close()

    async def watch(self) -> None:
        """Watch the engine's progress, until cancelled."""
        try:
            while True:
                await asyncio.sleep(self.chat.health.interval_s if self.chat else _IDLE_S)
                if self.chat is not None:
                    self.chat.health.tick()
        finally:
            if self.chat is not None:
                self.chat.health.close()

    def _loading(self) -> Unavailable:
        return Unavailable(
            f"The model is still loading ({self.phase}). Please try again in a few seconds.",
            code="loading",
            retry_after_s=RETRY_S,
        )
