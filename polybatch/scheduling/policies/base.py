"""What a policy may decide, each with a plain default: first come, first served.

A policy is one object per scheduler. A hook that is not overridden costs a call per step at most. Whatever
a policy decides, the scheduler keeps the laws: pages and budgets hold, rows of batches come after live
requests, and nothing that a step has planned already is preempted in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

from polybatch.memory.prefix_tree import MatchResult
from polybatch.request import Request
from polybatch.scheduling.budget import PrefillBudget, StepSoFar
from polybatch.scheduling.deadlines import Due, due_of
from polybatch.scheduling.pace import Pace
from polybatch.scheduling.track import BATCH_PRIORITY, Key, Track
from polybatch.scheduling.waiting import Waiting, WaitingQueue

if TYPE_CHECKING:
    from polybatch.config import SchedulerConfig
    from polybatch.memory.arena import Arena
    from polybatch.scheduling.costs import StepCosts
    from polybatch.scheduling.plan import StepPlan, StepResult


class Policy:
    """First come, first served, and the seam that other policies override.

    arena: to be looked at only. costs: predicts a step's time; None where nothing is known about it.
    pace: how fast steps are; kept up to date by the scheduler.
    """

    summary: ClassVar[str] = "first come, first served"
    is_paced: ClassVar[bool] = False
    """Whether it looks at `pace`, which is else kept only where there is a cost model."""
    is_by_arrival: ClassVar[bool] = False
    """Whether, of equal priority, who came first goes first, so that later ones change nothing for it."""
    is_planning: ClassVar[bool] = False
    """Whether it looks at all rows of batches that wait, so that more of them are worth having at once."""

    def __init__(self, config: SchedulerConfig, arena: Arena, costs: StepCosts | None = None) -> None:
        self.config = config
        self.arena = arena
        self.costs = costs
        self.pace = Pace(config, arena.page_size, costs)
        self._budget = PrefillBudget(config, arena, costs)

    def begin(self, now: float) -> None:
        """A step is about to be planned."""

    def due(self, request: Request, now: float) -> Due | None:
        """When a request's tokens are due, worked out when it is added; None where nothing is promised."""
        return due_of(request, self.config.service, now)

    def key(self, request: Request, order: int, now: float) -> Key:
        """A request's place when it is added; smaller goes first.

        It sorts the running sequences, and the waiting ones unless `queue` does otherwise.
        order: counts sequences in order of arrival and must be the key's last element: keys are unique. Rows
        of batches must come after all others. A preempted sequence keeps its key, which puts it before
        everything of its class that came later.
        """
        return (1 if request.priority >= BATCH_PRIORITY else 0, order)

    def added(self, track: Track) -> None:
        """A new track is live; it waits, or its sibling does that computes its prompt."""

    def queue(self) -> Waiting:
        """The waiting queue; asked for once."""
        return WaitingQueue()

    def prefills(self, running: list[Track], now: float) -> list[Track]:
        """In which order running prefills get chunks. running: by their keys, all live or all of batches."""
        return running

    def prefill_budget(self, step: StepSoFar) -> int:
        """Prefill tokens of this step, given the decodes that it carries already; at least 1."""
        return self._budget.tokens(step)

    def victim(self, candidates: Sequence[Track]) -> Track:
        """Who loses its pages where they run out.

        candidates: at least one, by their keys: those after the one that needs pages, or the rows of batches
        where they make way for live requests. None is in this step's plan yet.
        """
        return candidates[-1]

    def may_admit(self, track: Track, match: MatchResult, running: Sequence[Track]) -> bool:
        """Whether a waiting track, next in order, may start in this step; False ends the step's admissions.

        match: what of it is cached. Pages that it needs at once are seen to elsewhere. Where nothing runs,
        the answer counts for nothing, so nobody waits for ever.
        """
        return True

    def num_kept(self, track: Track) -> int | None:
        """Of a track that ends, how many tokens' KV, from the first on, to cache; None for all there is."""
        return None

    def to_abort(self, now: float) -> Iterable[tuple[Track, str]]:
        """Who is to end at once, and what they are told; asked for before a step is planned."""
        return ()

    def admitted(self, track: Track, now: float) -> None:
        """A track starts for the first time; its pages are known, its key may still change."""

    def served(self, plan: StepPlan, result: StepResult) -> None:
        """A step brought these tokens."""

    def finished(self, track: Track) -> None:
        """A track ended, wherever it was; its sequence says why."""
