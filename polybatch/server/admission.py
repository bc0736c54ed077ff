"""The bounded queue: how much may wait before clients are asked to come back later.

What runs is told from what waits by the engine's own limits: calls are let through in their order while the
completions fit `max_num_seqs` and the prompts the page pool; the rest waits.

Where several tenants share the queue, one that holds as much of it as is still free gets no more: whoever
floods it, there is room for the others. Source: dynamic thresholds (Choudhury and Hahne 1998), with alpha =
1.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable

from polybatch.errors import RequestError
from polybatch.server.errors import HttpError, busy
from polybatch.server.tenants import UNLIMITED, TenantLimits

MAX_RETRY_AFTER_S = 60
RATE_WINDOW = 32


class Ticket:
    """A call that was let in. num_seqs: completions; num_tokens: of its prompts."""

    __slots__ = ("is_over", "is_running", "num_seqs", "num_tokens", "tenant")

    def __init__(self, num_seqs: int, num_tokens: int, tenant: str = "") -> None:
        self.num_seqs, self.num_tokens, self.tenant = num_seqs, num_tokens, tenant
        self.is_running = self.is_over = False


class Admission:
    """Counts what runs and what waits.

    max_running_seqs, max_running_tokens: of the engine. max_queued_seqs, max_queued_tokens: of the queue.
    is_shared: several tenants use it.
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
        self.is_shared = False
        self._seqs_of: Counter[str] = Counter()
        self._queued_seqs_of: Counter[str] = Counter()
        self._queued_tokens_of: Counter[str] = Counter()
        self._waiting: deque[Ticket] = deque()
        self._left_s: deque[float] = deque(maxlen=RATE_WINDOW)
        self.num_running_seqs = self.num_running_tokens = 0
        self.num_queued_seqs = self.num_queued_tokens = 0

    def enter(
        self, num_seqs: int, num_tokens: int, tenant: str = "", limits: TenantLimits = UNLIMITED
    ) -> Ticket:
        """Let a call in. Raises HttpError 429 if it would have to wait and the queue is full, or its tenant
        has no more room; RequestError if the tenant could never have as many completions at once.

        A call of any size may wait in an empty queue.
        """
        ticket = Ticket(num_seqs, num_tokens, tenant)
        self._check_in_flight(tenant, num_seqs, limits.max_reqs)
        if not self._waiting and self._fits(ticket):
            self._run(ticket)
            self._seqs_of[tenant] += num_seqs
            return ticket
        self._check_share(tenant, num_tokens, limits.max_queued_tokens)
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
        self._seqs_of[tenant] += num_seqs
        self._count_queued(ticket, 1)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """The call is over, finished or not. Idempotent."""
        if ticket.is_over:
            return
        ticket.is_over = True
        _add(self._seqs_of, ticket.tenant, -ticket.num_seqs)
        if ticket.is_running:
            self.num_running_seqs -= ticket.num_seqs
            self.num_running_tokens -= ticket.num_tokens
            self._left_s.append(self._clock())
        else:
            self._waiting.remove(ticket)
            self._count_queued(ticket, -1)
        while self._waiting and self._fits(self._waiting[0]):
            first = self._waiting.popleft()
            self._count_queued(first, -1)
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

    def _count_queued(self, ticket: Ticket, sign: int) -> None:
        self.num_queued_seqs += sign * ticket.num_seqs
        self.num_queued_tokens += sign * ticket.num_tokens
        _add(self._queued_seqs_of, ticket.tenant, sign * ticket.num_seqs)
        _add(self._queued_tokens_of, ticket.tenant, sign * ticket.num_tokens)

    def _check_in_flight(self, tenant: str, num_seqs: int, limit: int | None) -> None:
        if limit is None:
            return
        if num_seqs > limit:
            raise RequestError(
                f"the call asks for {num_seqs:,} completions; this tenant may have {limit:,} in flight: "
                "lower n or send fewer prompts",
                field="n",
            )
        in_flight = self._seqs_of[tenant]
        if in_flight + num_seqs > limit:
            raise self._full(
                f"this tenant has {in_flight:,} completions in flight, with these {in_flight + num_seqs:,}; "
                f"it may have {limit:,}",
                "tenant_limit",
            )

    def _check_share(self, tenant: str, num_tokens: int, limit: int | None) -> None:
        """What a tenant may have waiting, by its own limit and beside other tenants."""
        seqs, tokens = self._queued_seqs_of[tenant], self._queued_tokens_of[tenant]
        if limit is not None and tokens and tokens + num_tokens > limit:
            raise self._full(
                f"{tokens:,} prompt tokens of this tenant wait, with these {tokens + num_tokens:,}; "
                f"it may have {limit:,}",
                "tenant_limit",
            )
        if self.is_shared and (
            seqs > self._max_queued_seqs - self.num_queued_seqs
            or tokens > self._max_queued_tokens - self.num_queued_tokens
        ):
            raise self._full(
                f"this tenant has {seqs:,} completions of {tokens:,} prompt tokens waiting, more than the "
                "queue has left for all",
                "tenant_limit",
            )

    def _full(self, message: str, code: str = "queue_full") -> HttpError:
        return busy(f"{message}; try again later", self._retry_after_s(), code)

    def _retry_after_s(self) -> int:
        """Seconds until half of the queue has gone, at the rate at which calls ended lately."""
        if len(self._left_s) < 2:
            return 1
        rate = (len(self._left_s) - 1) / max(self._clock() - self._left_s[0], 1e-3)
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(len(self._waiting) / 2 / rate)))


def _add(counts: Counter[str], tenant: str, number: int) -> None:
    """Count, keeping only tenants that have something."""
    counts[tenant] += number
    if not counts[tenant]:
        del counts[tenant]
