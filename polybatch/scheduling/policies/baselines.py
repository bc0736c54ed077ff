"""Policies to compare with: orders of textbooks, and S-LoRA's admission control.

Source: S-LoRA (Sheng et al. 2023), section on early abort, for `newest_first` and `early_abort`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from math import inf
from typing import TYPE_CHECKING, ClassVar

from polybatch.request import Request, SequenceStatus
from polybatch.scheduling.policies.base import Policy
from polybatch.scheduling.track import BATCH_PRIORITY, Key, Track
from polybatch.scheduling.waiting import WaitingQueue

if TYPE_CHECKING:
    from polybatch.config import SchedulerConfig
    from polybatch.memory.arena import Arena
    from polybatch.scheduling.costs import StepCosts

LEAST_PREFILL_S = 0.5
"""What a first token takes at least, for `early_abort`."""

NEW_SHARE = 0.7
"""Of the newest round in the moving averages of `early_abort`."""


def _class_of(request: Request) -> int:
    return 1 if request.priority >= BATCH_PRIORITY else 0


class EarliestDeadlineFirst(Policy):
    summary: ClassVar[str] = "earliest first token due first (a baseline)"

    def key(self, request: Request, order: int, now: float) -> Key:
        due = self.due(request, now)
        return (_class_of(request), inf if due is None else min(due.first_s, due.last_s), order)


class ShortestFirst(Policy):
    summary: ClassVar[str] = "shortest prompt first (a baseline)"

    def key(self, request: Request, order: int, now: float) -> Key:
        return (_class_of(request), len(request.prompt_token_ids), order)


class NewestFirst(Policy):
    summary: ClassVar[str] = "last come, first served (a baseline)"

    def key(self, request: Request, order: int, now: float) -> Key:
        return (_class_of(request), -order, order)


class EitherEndQueue:
    """Live requests oldest or newest first, as it is set; then rows of batches."""

    __slots__ = ("_live", "_rows", "is_newest_first")

    def __init__(self) -> None:
        self._live, self._rows = WaitingQueue(), WaitingQueue()
        self.is_newest_first = False

    def __len__(self) -> int:
        return len(self._live) + len(self._rows)

    def head(self, n: int) -> list[Track]:
        live = self._live.tail(n) if self.is_newest_first else self._live.head(n)
        return live + self._rows.head(n - len(live))

    def push(self, track: Track) -> None:
        (self._rows if track.is_batch else self._live).push(track)

    def remove(self, track: Track) -> None:
        (self._rows if track.is_batch else self._live).remove(track)


class EarlyAbort(Policy):
    """Gives up whose first token cannot come in time; newest first while more come than are served."""

    summary: ClassVar[str] = "S-LoRA's admission control (a baseline)"

    def __init__(self, config: SchedulerConfig, arena: Arena, costs: StepCosts | None = None) -> None:
        super().__init__(config, arena, costs)
        self._queue = EitherEndQueue()
        self._late_at: list[tuple[float, int, Track]] = []
        self._arrivals = self._batch = 0.0
        self._num_arrived = self._num_admitted = 0

    def queue(self) -> EitherEndQueue:
        return self._queue

    def begin(self, now: float) -> None:
        """A round ends with every step that admitted somebody."""
        if self._num_admitted:
            self._arrivals += NEW_SHARE * (self._num_arrived - self._arrivals)
            self._batch += NEW_SHARE * (self._num_admitted - self._batch)
            self._queue.is_newest_first = self._arrivals >= self._batch
            self._num_arrived = self._num_admitted = 0

    def key(self, request: Request, order: int, now: float) -> Key:
        self._num_arrived += 1
        return super().key(request, order, now)

    def added(self, track: Track) -> None:
        if track.due is not None and track.due.first_s < inf:
            late_s = track.due.first_s - LEAST_PREFILL_S
            heapq.heappush(self._late_at, (late_s, int(track.key[-1]), track))

    def admitted(self, track: Track, now: float) -> None:
        self._num_admitted += 1

    def to_abort(self, now: float) -> Iterator[tuple[Track, str]]:
        while self._late_at and self._late_at[0][0] < now:
            track = heapq.heappop(self._late_at)[-1]
            if track.seq.status is SequenceStatus.WAITING and not track.seq.num_preemptions:
                yield track, "its first token would have been late"
