"""What is being served at this moment: nothing yet, a model, or nothing any more."""

from dataclasses import dataclass

from ochat_serve.chat_service import ChatService
from ochat_serve.errors import Unavailable

LOADING_RETRY_S = 5


@dataclass
class Serving:
    """The app's one piece of changing state.  ``phase`` is a word or two for people."""

    phase: str = "starting"
    chat: ChatService | None = None

    def require_chat(self) -> ChatService:
        """The service, if it can answer now.  Raises ``Unavailable``."""
        trouble = self._trouble()
        if trouble is not None:
            raise trouble
        assert self.chat is not None
        return self.chat

    def status(self) -> tuple[bool, dict[str, str]]:
        """Whether requests can be answered, and the body of a readiness probe."""
        trouble = self._trouble()
        if trouble is None:
            return True, {"status": "ready"}
        return False, {"status": str(trouble.code), "phase": self.phase, "reason": trouble.message}

    def _trouble(self) -> Unavailable | None:
        if self.chat is None:
            return Unavailable(
                f"The model is still loading ({self.phase}). Please try again in a few seconds.",
                code="loading",
                retry_after_s=LOADING_RETRY_S,
            )
        failure = self.chat.served.engine.failure
        if failure is not None:
            return Unavailable(failure, code="engine_dead", retry_after_s=10)
        return None
