"""What rows of batches may take of a step: the time that live requests in it do not miss.

Beside live requests a step may become longer by a share of what it would take without rows, and never so long
that a token of theirs is late. A step of rows alone is kept short where live requests may arrive meanwhile.
"""

from __future__ import annotations

from itertools import islice
from math import inf

from polybatch.config import ServiceLevels
from polybatch.scheduling.admission import PlanDraft
from polybatch.scheduling.budget import MARGIN, MIN_PREFILL_TOKENS, StepSoFar, tightest_s
from polybatch.scheduling.costs import StepCosts
from polybatch.scheduling.live_tracks import LiveTracks
from polybatch.scheduling.policies import Policy
from polybatch.scheduling.step_time import StepTime, part_of
from polybatch.scheduling.track import Track


class RowSlack:
    """Bounds rows by predicted time; the rows themselves come in the policy's order."""

    def __init__(self, levels: ServiceLevels, page_size: int, costs: StepCosts) -> None:
        self._levels = levels
        self._timer = StepTime(costs, page_size)

    def limit_s(self, draft: PlanDraft, tracks: LiveTracks) -> float:
        """What the step may take with rows. draft: holds live requests only, and all of them that it will."""
        levels = self._levels
        if not draft.chunks:
            return levels.max_batch_step_s or levels.target_tbt_s or inf
        alone_s = self._timer.costs.predict(self._timer.shape(draft))
        slowdown = levels.batch_slowdown
        limit_s = inf if slowdown is None else alone_s * (1 + slowdown)
        if tracks.num_due or levels.target_tbt_s:
            limit_s = min(limit_s, tightest_s(draft, tracks.track_of, levels.target_tbt_s, alone_s) / MARGIN)
        return limit_s

    def decodes(self, draft: PlanDraft, rows: list[Track], limit_s: float, *, at_least: bool) -> list[Track]:
        """The rows that may go on, in their order: prefills, and as many decodes as fit in the time.

        at_least: one decode in any case.
        """
        if limit_s == inf:
            return rows
        decoding = [row for row in rows if not row.seq.is_prefilling]
        most = self._timer.max_rows(self._timer.shape(draft), decoding, limit_s, draft.resident)
        paused = set(decoding[max(most, int(at_least)) :])
        return [row for row in rows if row not in paused]

    def prefill_budget(self, policy: Policy, step: StepSoFar, *, at_least: bool) -> int:
        """Prefill tokens of rows in this step; 0 if a minimal chunk does not fit, but for at_least."""
        tokens = policy.prefill_budget(step)
        if at_least or step.limit_s == inf:
            return tokens
        timer = self._timer
        parts = [*map(part_of, step.prefills), *map(part_of, islice(step.waiting.head(1), 1))]
        least_s = timer.with_prefill(
            timer.shape(step.draft), parts, min(MIN_PREFILL_TOKENS, tokens), step.draft.resident
        )
        return tokens if least_s <= step.limit_s else 0
