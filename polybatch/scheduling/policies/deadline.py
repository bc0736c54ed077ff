"""Deadlines: who is due first goes first, what can no longer be met waits for what still can.

The order is least slack blended with least work: by when the first token is due, plus a penalty per token of
prompt, so that many short prompts are not made late by one long one. A request that waits and whose first
token cannot come in time any more is relegated: it runs after all that still can be met, or, with
abort_late, ends with an error at once. Nothing that has run is ever relegated. To keep the relegated from
starving where there is always something to meet, every RELEGATED_TURN-th admission and step of prefill is
theirs, oldest first.

A stage of a workflow is due when its share of the workflow's time is over (`workflow`), and goes by how long
it may still wait. Rows of batches come last.
Source: the deadline scheduler of Sarathi-Serve's authors (Niyama, 2025); HexGen-Flow for workflows.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, ClassVar

from polybatch.request import FinishReason, Request, SequenceStatus
from polybatch.scheduling.deadlines import Due
from polybatch.scheduling.pace import Pace
from polybatch.scheduling.policies.base import Policy
from polybatch.scheduling.track import BATCH_PRIORITY, Key, Track, num_expected
from polybatch.scheduling.waiting import WaitingQueue
from polybatch.scheduling.workflow import StageTimes

if TYPE_CHECKING:
    from polybatch.config import SchedulerConfig
    from polybatch.memory.arena import Arena
    from polybatch.scheduling.costs import StepCosts

BLEND = 12.0
"""A token of prompt puts a request back by so many times what it takes to compute."""

DECODE_SHARE = 0.5
"""Of the steps' time, what outputs may be counted on to get. Who could be met only by more would, once
running, leave prompts hardly any room, and whoever waits would come to the same pass."""

RELEGATED_TURN = 16

NO_DEADLINE_S = 60.0
"""Without deadlines a request is ordered as if its first token were due so long after its arrival."""

LIVE, RELEGATED, ROW = 0, 1, 2
"""First elements of keys."""


class DeadlineQueue:
    """Waiting tracks: those that can be met, the relegated, rows of batches, each by its keys."""

    __slots__ = ("classes", "num_since_relegated")

    def __init__(self) -> None:
        self.classes = (WaitingQueue(), WaitingQueue(), WaitingQueue())
        self.num_since_relegated = 0
        """Admissions while somebody relegated waited, since the last of one of them."""

    def __len__(self) -> int:
        return sum(map(len, self.classes))

    def head(self, n: int) -> Iterator[Track]:
        """Up to `n` tracks in the order of admission; the first relegated one leads when it is its turn."""
        live, relegated, rows = self.classes
        turn = relegated.head(1) if self.num_since_relegated >= RELEGATED_TURN - 1 else []
        yield from turn
        num_left = n - len(turn)
        for queue in (live, relegated, rows):
            if num_left <= 0:
                return
            for track in queue.head(num_left):
                if track not in turn:
                    yield track
                    num_left -= 1

    def push(self, track: Track) -> None:
        self.classes[int(track.key[0])].push(track)

    def remove(self, track: Track) -> None:
        """Take a track out, wherever it is. Raises ValueError if it is not there."""
        self.classes[int(track.key[0])].remove(track)

    def relegate(self, track: Track, arrival_s: float) -> None:
        """Put a waiting track behind all that can still be met."""
        self.remove(track)
        track.key = (RELEGATED, arrival_s, track.key[-1])
        self.classes[RELEGATED].push(track)

    def admitted(self, track: Track) -> None:
        if track.key[0] == RELEGATED:
            self.num_since_relegated = 0
        elif self.classes[RELEGATED]:
            self.num_since_relegated += 1


class Deadline(Policy):
    """Least slack first; late ones later."""

    summary: ClassVar[str] = "by deadlines, late ones last"
    is_paced: ClassVar[bool] = True

    def __init__(self, config: SchedulerConfig, arena: Arena, costs: StepCosts | None = None) -> None:
        super().__init__(config, arena, costs)
        self._queue = DeadlineQueue()
        self._stages = StageTimes(config.stage_times)
        self._now = 0.0
        self._num_steps = 0
        self._late_at: list[tuple[float, float, Track]] = []
        """Heap of when waiting requests can no longer be met, by the pace when they were put there."""
        self._given_up: list[Track] = []
        self._admitted_s: dict[Track, float] = {}
        """Of stages of workflows that run."""

    def due(self, request: Request, now: float) -> Due | None:
        """A stage of a workflow is due when its share of the workflow's time is over."""
        due, workflow = super().due(request, now), request.workflow
        if due is None or workflow is None:
            return due
        left_s, own_s = workflow.due_s - now, self._stage_s(request)
        stage_s = self._stages.budget_s(workflow.stage, workflow.remaining, left_s, own_s)
        return replace(due, last_s=min(due.last_s, now + stage_s))

    def key(self, request: Request, order: int, now: float) -> Key:
        due = self.due(request, now)
        kind = ROW if request.priority >= BATCH_PRIORITY else LIVE
        if due is not None and request.workflow is not None:
            return (kind, due.last_s - self._stage_s(request), order)
        first_s = inf if due is None else due.first_token_s(self.pace.mean_s or self.pace.step_s)
        if first_s == inf:
            first_s = (request.arrival_s or now) + NO_DEADLINE_S
        return (kind, first_s + BLEND * self.pace.grain_s * len(request.prompt_token_ids), order)

    def added(self, track: Track) -> None:
        # Siblings follow their first, and a workflow is worth ending late.
        seq = track.seq
        is_row_or_sibling = track.is_batch or seq.index > 0
        if track.due is None or is_row_or_sibling or seq.request.workflow is not None:
            return
        late_s = self._late_s(track)
        if late_s < inf:
            heapq.heappush(self._late_at, (late_s, track.key[-1], track))

    def queue(self) -> DeadlineQueue:
        return self._queue

    def begin(self, now: float) -> None:
        self._now = now
        self._num_steps += 1
        self._sort_out(now)

    def prefills(self, running: list[Track], now: float) -> list[Track]:
        if self._num_steps % RELEGATED_TURN == 0:
            at = next((i for i, track in enumerate(running) if track.key[0] == RELEGATED), 0)
            return [running[at], *running[:at], *running[at + 1 :]] if at else running
        return running

    def to_abort(self, now: float) -> Iterator[tuple[Track, str]]:
        """With abort_late, who can no longer have a first token in time."""
        self._sort_out(now)
        given_up, self._given_up = self._given_up, []
        for track in given_up:
            if track.seq.status is SequenceStatus.WAITING and track.due is not None:
                yield track, _told(track, track.due, now, self.pace, self._token_s)

    def admitted(self, track: Track, now: float) -> None:
        self._queue.admitted(track)
        if track.seq.request.workflow is not None:
            self._admitted_s[track] = now

    def finished(self, track: Track) -> None:
        admitted_s = self._admitted_s.pop(track, None)
        workflow = track.seq.request.workflow
        if admitted_s is None or workflow is None:
            return
        if track.seq.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            # Its last step was planned now, and is over only after it.
            self._stages.observe(workflow.stage, self._now - admitted_s + self.pace.mean_s)

    def _stage_s(self, request: Request) -> float:
        """What a stage will take once it runs."""
        workflow, pace = request.workflow, self.pace
        own_s = pace.prefill_s(len(request.prompt_token_ids)) + num_expected(request) * pace.step_s
        return own_s if workflow is None else self._stages.mean_s(workflow.stage, own_s)

    def _sort_out(self, now: float) -> None:
        """Relegate whoever waits and can no longer be met."""
        late_at = self._late_at
        while late_at and late_at[0][0] <= now:
            _, _, track = heapq.heappop(late_at)
            seq = track.seq
            if seq.status is not SequenceStatus.WAITING or seq.num_preemptions:
                continue
            late_s = self._late_s(track)
            if late_s > now:
                # The pace has become better since.
                heapq.heappush(late_at, (late_s, track.key[-1], track))
                continue
            assert track.due is not None
            self._queue.relegate(track, track.due.arrival_s)
            if self.config.service.abort_late:
                self._given_up.append(track)

    def _late_s(self, track: Track) -> float:
        """From when on a waiting track's first token is late even if it starts at once."""
        assert track.due is not None
        return track.due.first_token_s(self._token_s) - self.pace.prefill_s(track.seq.num_tokens)

    @property
    def _token_s(self) -> float:
        """Seconds that a token of output may be counted on to take."""
        pace = self.pace
        return max(pace.step_s, min(pace.step_s / DECODE_SHARE, pace.full_s))


def _told(track: Track, due: Due, now: float, pace: Pace, token_s: float) -> str:
    needed_s = pace.prefill_s(track.seq.num_tokens)
    return (
        f"the first token is due {due.first_token_s(token_s) - due.arrival_s:.3g} s after arrival; after "
        f"{now - due.arrival_s:.3g} s of waiting it would take at least {needed_s:.3g} s more: allow more "
        "time, or send it when less is to do"
    )
