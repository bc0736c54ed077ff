"""The bounded queue: how much may wait before clients are asked to come back later.

What runs is told from what waits by the engine's own limits: calls are let through in their order while the
completions fit `max_num_seqs` and the prompts the page pool; the rest waits.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from polybatch.server.errors import HttpError

MAX_RETRY_AFTER_S = 60
RATE_WINDOW = 32


class Ticket:
    """A call that was let in. num_seqs: completions; num_tokens: of its prompts."""

    __slots__ = ("is_over", "is_running", "num_seqs", "num_tokens")

    def __init__(self, num_seqs: int, num_tokens: int) -> None:
        self.num_seqs, self.num_tokens = num_seqs, num_tokens
        self.is_running = self.is_over = False


class Admission:
    """Counts what runs and what waits.

    max_running_seqs, max_running_tokens: of the engine. max_queued_seqs, max_queued_tokens: of the queue.
    """

    def __init__(
        self,
        max_running_seqs: int,
        max_running_tokens: int,
        max_queued_seqs: int,
        max_queued_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_running_seqs, self._max_running_tokens = max_running_seqs, max_running_tokens
        self._max_queued_seqs, self._max_queued_tokens = max_queued_seqs, max_queued_tokens
        self._clock = clock
        self._waiting: deque[Ticket] = deque()
        self._left_s: deque[float] = deque(maxlen=RATE_WINDOW)
        self.num_running_seqs = self.num_running_tokens = 0
        self.num_queued_seqs = self.num_queued_tokens = 0

    def enter(self, num_seqs: int, num_tokens: int) -> Ticket:
        """Let a call in. Raises HttpError 429 if it would have to wait and the queue is full.

        A call of any size may wait in an empty queue.
        """
        ticket = Ticket(num_seqs, num_tokens)
        if not self._waiting and self._fits(ticket):
            self._run(ticket)
            return ticket
        if self._waiting:
            for name, queued, more, limit in (
                ("completions", self.num_queued_seqs, num_seqs, self._max_queued_seqs),
                ("prompt tokens", self.num_queued_tokens, num_tokens, self._max_queued_tokens),
            ):
                if queued + more > limit:
                    raise self._full(
                        f"{queued:,} {name} wait, with these {queued + more:,}; the queue takes {limit:,}"
                    )
        self._waiting.append(ticket)
        self.num_queued_seqs += num_seqs
        self.num_queued_tokens += num_tokens
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """The call is over, finished or not. Idempotent."""
        if ticket.is_over:
            return
        ticket.is_over = True
        if ticket.is_running:
            self.num_running_seqs -= ticket.num_seqs
            self.num_running_tokens -= ticket.num_tokens
            self._left_s.append(self._clock())
        else:
            self._waiting.remove(ticket)
            self._unqueue(ticket)
        while self._waiting and self._fits(self._waiting[0]):
            first = self._waiting.popleft()
            self._unqueue(first)
            self._run(first)

    def _fits(self, ticket: Ticket) -> bool:
        if not self.num_running_seqs:
            return True
        return (
            self.num_running_seqs + ticket.num_seqs <= self._max_running_seqs
            and self.num_running_tokens + ticket.num_tokens <= self._max_running_tokens
        )

    def _run(self, ticket: Ticket) -> None:
        ticket.is_running = True
        self.num_running_seqs += ticket.num_seqs
        self.num_running_tokens += ticket.num_tokens

    def _unqueue(self, ticket: Ticket) -> None:
        self.num_queued_seqs -= ticket.num_seqs
        self.num_queued_tokens -= ticket.num_tokens

    def _full(self, message: str) -> HttpError:
        return HttpError(
            429,
            f"the server is busy: {message}; try again later",
            kind="rate_limit_error",
            code="queue_full",
            headers={"Retry-After": str(self._retry_after_s())},
        )

    def _retry_after_s(self) -> int:
        """Seconds until half of the queue has gone, at the rate at which calls ended lately."""
        if len(self._left_s) < 2:
            return 1
        rate = (len(self._left_s) - 1) / max(self._clock() - self._left_s[0], 1e-3)
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(len(self._waiting) / 2 / rate)))
