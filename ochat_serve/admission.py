"""Who goes into the engine next: bounded places, and a bounded, fair queue in front of them.

Fairness is that of a virtual token counter (Sheng et al., "Fairness in Serving Large Language
Models", 2024): every key has a counter of the tokens that were served to it, and among the keys
that wait, the one with the smallest counter goes next.  A key that was away starts where the
others stand, so nobody saves up time.

A key without a running request always finds a place soon: a few places are never given to
those that have one already, and only so many prompt tokens are in prefill at a time, so that a
newcomer's prompt is not behind a hundred others inside the engine.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ochat_serve.errors import Unavailable

# One place in this many is for keys that have nothing running, and at least one where there are
# so many that one is no great loss.
_RESERVED_SHARE = 16
_RESERVES_FROM = 4
# Steps' worth of prompt tokens that may be in prefill: one that runs, one that is next.
_PREFILL_STEPS = 2
# What an answer is taken to cost until its end shows what it did.
_EXPECTED_TOKENS = 256
_MAX_KEYS = 10_000
_MAX_RETRY_S = 30

Key = str | None


def _nobody(_: Unavailable | None = None) -> None:
    pass


@dataclass(eq=False, slots=True)
class Ticket:
    """One request's place, or its place in the queue.  ``places`` are sequences in the engine.

    Of a ticket that waits, ``on_admitted`` is called when it no longer does, or ``on_refused``
    when its place in the queue is needed for others.
    """

    key: Key
    prompt_tokens: int
    places: int
    admitted: bool = False
    on_admitted: Callable[[], None] = _nobody
    on_refused: Callable[[Unavailable], None] = _nobody
    prefilling: bool = False
    left: bool = False


@dataclass(eq=False, slots=True)
class _Line:
    """One key's: its counter, its running places, its waiting tickets and their tokens."""

    served_tokens: int = 0
    running: int = 0
    waiting: deque[Ticket] = field(default_factory=deque)
    waiting_tokens: int = 0

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting


class Admission:
    """``slots`` places in the engine, ``max_queue`` requests and ``max_queue_tokens`` of their
    prompts' tokens waiting for one, ``step_tokens`` prompt tokens prefilled in a step.

    Not thread-safe: for one event loop.
    """

    def __init__(
        self, *, slots: int, max_queue: int, max_queue_tokens: int, step_tokens: int
    ) -> None:
        self._slots = slots
        self._max_queue = max_queue
        self._max_queue_tokens = max_queue_tokens
        self._max_prefill = _PREFILL_STEPS * step_tokens
        self._reserved = max(1, slots // _RESERVED_SHARE) if slots >= _RESERVES_FROM else 0
        self._lines: OrderedDict[Key, _Line] = OrderedDict()
        self._queue: set[_Line] = set()  # those that have somebody waiting
        self._level = 0  # the counter of whoever went in last: where newcomers start
        self.running = 0
        self.waiting = 0
        self._waiting_tokens = 0
        self._prefilling = 0

    def enter(self, key: Key, prompt_tokens: int, places: int) -> Ticket:
        """A ticket that is admitted, or waits.  ``leave`` must follow.  Raises ``Unavailable``
        when the queue is full."""
        ticket = Ticket(key, prompt_tokens, min(places, self._slots))
        line = self._line(key)
        if not self.waiting and self._fits(ticket, line):
            self._admit(ticket, line)
            return ticket
        self._put_in(ticket, line)
        self._admit_next()
        if not ticket.admitted:
            self._make_room(ticket, line)
        return ticket

    def prefilled(self, ticket: Ticket) -> None:
        """Its first token has come."""
        if ticket.prefilling:
            ticket.prefilling = False
            self._prefilling -= ticket.prompt_tokens
            if self.waiting:
                self._admit_next()

    def leave(self, ticket: Ticket, completion_tokens: int) -> None:
        """It has ended, however; a second call does nothing."""
        if ticket.left:
            return
        ticket.left = True
        line = self._lines[ticket.key]
        if not ticket.admitted:
            self._take_out(ticket, line)
            self._admit_next()  # it may have been a large one that all others waited for
            return
        line.served_tokens += completion_tokens - _EXPECTED_TOKENS
        line.running -= ticket.places
        self.running -= ticket.places
        if ticket.prefilling:
            ticket.prefilling = False
            self._prefilling -= ticket.prompt_tokens
        if self.waiting:
            self._admit_next()

    def _line(self, key: Key) -> _Line:
        line = self._lines.get(key)
        if line is None:
            if len(self._lines) >= _MAX_KEYS:
                self._forget_one()
            line = self._lines[key] = _Line()
        if line.is_idle:
            line.served_tokens = max(line.served_tokens, self._level)
            self._lines.move_to_end(key)
        return line

    def _forget_one(self) -> None:
        """The one that has been idle for the longest time."""
        for key, line in self._lines.items():
            if line.is_idle:
                del self._lines[key]
                return

    def _fits(self, ticket: Ticket, line: _Line) -> bool:
        return self._engine_has_room(ticket) and self._may_take(ticket, line)

    def _engine_has_room(self, ticket: Ticket) -> bool:
        return self.running + ticket.places <= self._slots and (
            not self._prefilling or self._prefilling + ticket.prompt_tokens <= self._max_prefill
        )

    def _may_take(self, ticket: Ticket, line: _Line) -> bool:
        """Whether it leaves the reserved places alone, or is one of those they are for."""
        # Where no keys are set, all requests are one key's: nobody else will come.
        if not line.running or ticket.key is None:
            return True
        return self.running + ticket.places <= self._slots - self._reserved

    def _admit(self, ticket: Ticket, line: _Line) -> None:
        self._level = line.served_tokens
        line.served_tokens += ticket.prompt_tokens + _EXPECTED_TOKENS
        line.running += ticket.places
        self.running += ticket.places
        self._prefilling += ticket.prompt_tokens
        ticket.admitted = ticket.prefilling = True

    def _admit_next(self) -> None:
        """As many as fit, one key after the other."""
        while (line := self._next()) is not None:
            ticket = line.waiting[0]
            self._take_out(ticket, line)
            self._admit(ticket, line)
            ticket.on_admitted()

    def _next(self) -> _Line | None:
        """Whose turn it is, if there is room for its first.  Nobody overtakes it for being
        smaller; but while it may not take a reserved place, others may."""
        for line in sorted(self._queue, key=lambda line: line.served_tokens):
            if not self._engine_has_room(line.waiting[0]):
                return None
            if self._may_take(line.waiting[0], line):
                return line
        return None

    def _make_room(self, ticket: Ticket, line: _Line) -> None:
        """In a queue that is too full: the key that fills most of it gives way, be it this one.
        Nobody does in vain.  Raises ``Unavailable``."""
        if not self._is_too_full():
            return
        error = self._full()
        given_up: list[tuple[Ticket, _Line]] = []
        while self._is_too_full():
            largest = max(self._queue, key=self._share)
            if self._share(largest) <= self._share(line):
                self._take_out(ticket, line)
                ticket.left = True
                for other, its_line in reversed(given_up):
                    self._put_in(other, its_line)
                raise error
            given_up.append((largest.waiting[-1], largest))
            self._take_out(*given_up[-1])
        for other, _ in given_up:
            other.left = True
            other.on_refused(error)

    def _is_too_full(self) -> bool:
        """One may wait whatever its size."""
        return self.waiting > self._max_queue or (
            self.waiting > 1 and self._waiting_tokens > self._max_queue_tokens
        )

    def _share(self, line: _Line) -> float:
        """Of the queue's room: the larger of its share in requests and in tokens."""
        return max(
            len(line.waiting) / max(1, self._max_queue),
            line.waiting_tokens / max(1, self._max_queue_tokens),
        )

    def _put_in(self, ticket: Ticket, line: _Line) -> None:
        line.waiting.append(ticket)
        self._queue.add(line)
        self._count_waiting(ticket, line, 1)

    def _take_out(self, ticket: Ticket, line: _Line) -> None:
        line.waiting.remove(ticket)
        if not line.waiting:
            self._queue.discard(line)
        self._count_waiting(ticket, line, -1)

    def _count_waiting(self, ticket: Ticket, line: _Line, by: int) -> None:
        self.waiting += by
        self._waiting_tokens += by * ticket.prompt_tokens
        line.waiting_tokens += by * ticket.prompt_tokens

    def _full(self) -> Unavailable:
        """Names the limit that was passed."""
        wait_s = min(_MAX_RETRY_S, 1 + self.waiting // self._slots)
        what = (
            f"{self._max_queue} requests"
            if self.waiting > self._max_queue
            else f"requests of {self._max_queue_tokens} prompt tokens"
        )
        return Unavailable(
            f"The server's queue is full: at most {what} may wait for a place. "
            f"Please try again in {wait_s} seconds.",
            code="overloaded",
            retry_after_s=wait_s,
        )
