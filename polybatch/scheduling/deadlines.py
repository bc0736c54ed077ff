"""When tokens are due, worked out once at the door, and whether they came in time."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from polybatch.config import ServiceLevels
from polybatch.request import Deadlines, Request
from polybatch.scheduling.track import BATCH_PRIORITY, num_expected


@dataclass(slots=True)
class Due:
    """Points in time on the engine's clock; infinity where nothing is promised.

    arrival_s: from when all of them count. first_s: of the first token. pace_s: seconds for each further
    token. last_s: of the last token. started_s: when the first token was there, None before.
    num_expected: tokens of output, as far as anybody knows.
    """

    arrival_s: float
    first_s: float
    pace_s: float
    last_s: float
    num_expected: int
    started_s: float | None = None

    def next_token_s(self, num_output: int, now: float) -> float:
        """When the next token of a sequence that decodes is due.

        A first token that came early gives the others time: all count from when it was due.
        Source: the deadline scheduler of Sarathi-Serve's authors (Niyama, 2025).
        """
        if self.started_s is None:
            self.started_s = now
        due = inf
        if self.pace_s < inf:
            begun = self.started_s if self.first_s == inf else max(self.started_s, self.first_s)
            due = begun + self.pace_s * num_output
        if self.last_s < inf:
            due = min(due, now + (self.last_s - now) / max(1, self.num_expected - num_output))
        return due

    def first_token_s(self, pace_s: float) -> float:
        """When the first token must be there for all that is promised.

        pace_s: what a token of output will take, where no pace is promised.
        """
        if self.last_s == inf:
            return self.first_s
        pace = self.pace_s if self.pace_s < inf else pace_s
        return min(self.first_s, self.last_s - pace * (self.num_expected - 1))


def deadlines_of(request: Request, levels: ServiceLevels) -> Deadlines | None:
    """A request's own deadlines, or those of its class; None for none."""
    if request.deadlines is not None:
        return request.deadlines
    if request.priority >= BATCH_PRIORITY:
        return None if levels.batch_e2e_s is None else Deadlines(e2e_s=levels.batch_e2e_s)
    if levels.ttft_s is levels.tpot_s is levels.e2e_s is None:
        return None
    return Deadlines(levels.ttft_s, levels.tpot_s, levels.e2e_s)


def due_of(request: Request, levels: ServiceLevels, now: float) -> Due | None:
    """When a request's tokens are due; None where nothing is promised.

    A request without an arrival of its own arrives now.
    """
    deadlines, workflow = deadlines_of(request, levels), request.workflow
    if deadlines is None and workflow is None:
        return None
    deadlines = deadlines or Deadlines()
    arrival = request.arrival_s or now
    last = inf if deadlines.e2e_s is None else arrival + deadlines.e2e_s
    return Due(
        arrival_s=arrival,
        first_s=inf if deadlines.ttft_s is None else arrival + deadlines.ttft_s,
        pace_s=inf if deadlines.tpot_s is None else deadlines.tpot_s,
        last_s=last if workflow is None else min(last, workflow.due_s),
        num_expected=num_expected(request),
    )


@dataclass(frozen=True, slots=True)
class Attainment:
    """Which deadlines were met; None for what was not promised."""

    ttft: bool | None = None
    tpot: bool | None = None
    e2e: bool | None = None

    @property
    def is_met(self) -> bool:
        """Whether everything that was promised was kept."""
        return False not in (self.ttft, self.tpot, self.e2e)


def attainment_of(
    deadlines: Deadlines,
    arrival_s: float,
    first_token_s: float | None,
    finished_s: float | None,
    num_output: int,
    *,
    has_ended_well: bool = True,
) -> Attainment:
    """What came of a request's deadlines. What never came is late; tpot is the mean over its tokens.

    finished_s: of its last token. has_ended_well: False for an abort or an error, which keep nothing.
    """

    def kept(limit: float | None, seconds: float | None) -> bool | None:
        if limit is None:
            return None
        return has_ended_well and seconds is not None and seconds <= limit

    ttft = None if first_token_s is None else first_token_s - arrival_s
    e2e = None if finished_s is None else finished_s - arrival_s
    tpot = None
    if first_token_s is not None and finished_s is not None:
        tpot = (finished_s - first_token_s) / max(1, num_output - 1)
    return Attainment(kept(deadlines.ttft_s, ttft), kept(deadlines.tpot_s, tpot), kept(deadlines.e2e_s, e2e))
