"""Token-fair sharing between tenants.

Each tenant has a virtual counter of the service that it was given: tokens computed for its prompts and tokens
generated for it, the latter weighted double. The next to be admitted is the earliest request of the tenant
with the smallest counter, so that tenants who have work waiting get equal service, whatever they send and
however much. Whoever comes back from having nothing waiting is lifted to the smallest counter of those who
wait: time not used is not saved up. Nothing is held back while there is room, so no capacity is lost.

The law: counters of two tenants who both have requests waiting differ by at most
U = max(w_p * L, w_q * M), with L the longest prompt and M the tokens that one batch can hold; what two such
tenants were given over any interval differs by at most 2 U. Hence nobody starves.

Prompt tokens are charged once, at the first admission, and only those that had to be computed: a cached
prefix costs nobody. Computing again after a preemption is the engine's doing and is not charged. Rows of
batches come after everything else and have accounts of their own, fair among each other.
Source: Virtual Token Counter, "Fairness in Serving Large Language Models" (Sheng et al. 2024), algorithm 2.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from polybatch.request import Request
from polybatch.scheduling.plan import StepPlan, StepResult
from polybatch.scheduling.policies.base import Policy
from polybatch.scheduling.track import BATCH_PRIORITY, Key, Track
from polybatch.scheduling.waiting import WaitingQueue

if TYPE_CHECKING:
    from polybatch.config import SchedulerConfig
    from polybatch.memory.arena import Arena
    from polybatch.scheduling.costs import StepCosts

INPUT_WEIGHT = 1
OUTPUT_WEIGHT = 2
"""A generated token costs a step, a prompt's token only a share of one; also the usual ratio of prices."""

Account = tuple[bool, str]
"""Whether it is for rows of batches, and the tenant."""


def account_of(request: Request) -> Account:
    return request.priority >= BATCH_PRIORITY, request.tenant


class FairQueue:
    """Waiting tracks by tenant, handed out in the order of the tenants' counters.

    An admitted track gets a new key, its number of admission: those admitted last yield first, whenever they
    arrived, and after a preemption come before all of their tenant that were never admitted.
    """

    __slots__ = ("_counters", "_last", "_num_admitted", "_num_waiting", "_queues")

    def __init__(self) -> None:
        self._queues: dict[Account, WaitingQueue] = {}
        """Of accounts with something waiting, no others."""
        self._counters: dict[Account, int] = {}
        self._last: dict[bool, Account] = {}
        """Per class the account whose queue was the last to become empty."""
        self._num_waiting = 0
        self._num_admitted = 0

    @property
    def counters(self) -> dict[Account, int]:
        """Weighted tokens of every account ever seen, lifts included."""
        return self._counters

    @property
    def waiting(self) -> frozenset[Account]:
        """Who has something waiting."""
        return frozenset(self._queues)

    def __len__(self) -> int:
        return self._num_waiting

    def head(self, n: int) -> Iterator[Track]:
        """Up to `n` tracks; between two of them counters may grow by `admitted`, and the order follows."""
        tracks: dict[Account, list[Track]] = {}
        heap = [(account[0], self._counters[account], queue.head(1)[0].key, account)
                for account, queue in self._queues.items()]  # fmt: skip
        heapq.heapify(heap)
        num_left = n
        while heap and num_left:
            account = heap[0][3]
            if account not in tracks:
                # Reversed, to be taken from the end.
                tracks[account] = self._queues[account].head(num_left)[::-1]
            rest = tracks[account]
            yield rest.pop()
            num_left -= 1
            if rest:
                heapq.heapreplace(heap, (account[0], self._counters[account], rest[-1].key, account))
            else:
                heapq.heappop(heap)

    def push(self, track: Track) -> None:
        account = account_of(track.seq.request)
        queue = self._queues.get(account)
        if queue is None:
            self._lift(account)
            queue = self._queues[account] = WaitingQueue()
        queue.push(track)
        self._num_waiting += 1

    def remove(self, track: Track) -> None:
        """Take a track out, wherever it is. Raises ValueError if it is not there."""
        account = account_of(track.seq.request)
        queue = self._queues.get(account)
        if queue is None:
            raise ValueError(f"{track.seq!r} does not wait")
        queue.remove(track)
        self._num_waiting -= 1
        if not queue:
            del self._queues[account]
            self._last[account[0]] = account

    def admitted(self, track: Track) -> None:
        """Charge the part of a prompt that is to be computed; called once, when it is first admitted."""
        account = account_of(track.seq.request)
        track.key = (int(account[0]), self._num_admitted)
        self._num_admitted += 1
        self._counters[account] += INPUT_WEIGHT * track.seq.num_uncomputed

    def served(self, plan: StepPlan, result: StepResult) -> None:
        """Charge a step's tokens."""
        counters = self._counters
        for chunk, new in zip(plan.chunks, result.tokens, strict=True):
            if new:
                counters[account_of(chunk.seq.request)] += OUTPUT_WEIGHT * len(new)

    def _lift(self, account: Account) -> None:
        """No credit for time without work: not less than those who wait, or than who waited last."""
        counters = self._counters
        others = [counters[other] for other in self._queues if other[0] == account[0]]
        if not others and account[0] in self._last:
            others = [counters[self._last[account[0]]]]
        counters[account] = max(counters.get(account, 0), min(others, default=0))


class Fair(Policy):
    """First come, first served within a tenant; between tenants the smallest counter."""

    summary: ClassVar[str] = "equal service for tenants"

    def __init__(self, config: SchedulerConfig, arena: Arena, costs: StepCosts | None = None) -> None:
        super().__init__(config, arena, costs)
        self._queue = FairQueue()

    def key(self, request: Request, order: int, now: float) -> Key:
        """While it waits; whoever is admitted gets a key that begins with 0, or 1 for rows of batches."""
        return (2, order)

    def queue(self) -> FairQueue:
        return self._queue

    def admitted(self, track: Track, now: float) -> None:
        self._queue.admitted(track)

    def served(self, plan: StepPlan, result: StepResult) -> None:
        self._queue.served(plan, result)
