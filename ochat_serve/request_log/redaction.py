"""What patterns match in a text is replaced before the text is logged.

The patterns are the operator's, the texts anybody's: some patterns take for ever on some texts.
So the engine is ``regex``, which lets other threads run while it searches a text (``re`` holds
up the whole process) and gives up in time.  A text that was not searched to its end is replaced
whole.
"""

import logging
from collections.abc import Callable, Iterable

import regex

REDACTED = "[redacted]"
# For all texts of one line: ten lines a second are written at the very worst, while an ordinary
# pattern reads some megabytes in this time.
LINE_TIMEOUT_S = 0.1

logger = logging.getLogger(__name__)


class Redaction:
    """Patterns in ``regex``'s syntax, which is Python's and more.

    ``clock`` gives the calling thread's CPU seconds: a thread that has to wait for its turn must
    not run out of time on harmless texts.
    """

    def __init__(self, patterns: Iterable[str], clock: Callable[[], float]) -> None:
        self._patterns = [regex.compile(pattern) for pattern in patterns]
        self._clock = clock
        self._told = False

    def __call__(self) -> Callable[[str], str]:
        """What edits the texts of one line, all of them together in ``LINE_TIMEOUT_S``: each may
        take half of what is left, so that a long one leaves time to the short ones after it."""
        end = self._clock() + LINE_TIMEOUT_S

        def redact(text: str) -> str:
            for pattern in self._patterns:
                share = (end - self._clock()) / 2
                try:
                    if share <= 0:
                        raise TimeoutError
                    text = pattern.sub(REDACTED, text, timeout=share)
                except TimeoutError:
                    self._tell(pattern.pattern)
                    return REDACTED
            return text

        return redact

    def _tell(self, pattern: str) -> None:
        if not self._told:
            self._told = True
            logger.warning(
                "--log-redact %s takes too long on some texts: they are replaced whole.", pattern
            )
