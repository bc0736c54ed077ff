"""How many prefill tokens a step may carry beside its decodes, and how long it may take.

Without a cost model the number is fixed. With one it is the largest whose predicted time, with a margin,
leaves every decode in time: the tightest of the deadlines of next tokens and of the target between tokens.
Source: Sarathi-Serve (Agrawal et al. 2024) for the budget, its authors' deadline scheduler (Niyama, 2025)
for its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from math import inf
from typing import TYPE_CHECKING

from polybatch.request import Sequence
from polybatch.scheduling.admission import PlanDraft
from polybatch.scheduling.step_time import Part, StepTime, part_of
from polybatch.scheduling.track import Track
from polybatch.scheduling.waiting import Waiting

if TYPE_CHECKING:
    from polybatch.config import SchedulerConfig
    from polybatch.memory.arena import Arena
    from polybatch.scheduling.costs import StepCosts

MIN_PREFILL_TOKENS = 32
"""Prefill tokens a step keeps room for however many sequences decode, so that prompts never starve."""

FEW_TOKENS = 8
"""Where decodes would be late beside so much, and would not beside less, prefill is a multiple of this."""

MARGIN = 1.2
"""Predicted times count so many times, for they are wrong by up to a fifth."""

PRESSED_TOKENS = 512
"""Of prefill at most, where few pages are left: decodes will need them."""

PRESSED_SHARE = 1 / 32
"""Of the pool's pages; fewer that can be had are few."""

MAX_PARTS = 16
"""Waiting requests whose lengths are looked at to size a step's prefill."""


@dataclass(slots=True)
class StepSoFar:
    """A step whose decodes are planned and whose prefills are not; to be looked at only.

    draft: its chunks, loads and adapters. track_of: every live sequence. prefills: running, in the order that
    they get chunks. waiting: who may be admitted after them. num_due: live sequences that have deadlines.
    limit_s: what the step may take at most, beside what its decodes allow.
    """

    draft: PlanDraft
    track_of: Mapping[Sequence, Track]
    prefills: list[Track]
    waiting: Waiting
    num_due: int = 0
    limit_s: float = inf


class PrefillBudget:
    """The prefill tokens of a step. costs: None for a fixed number, of which decodes take their part."""

    def __init__(self, config: SchedulerConfig, arena: Arena, costs: StepCosts | None) -> None:
        self._limit = config.max_num_batched_tokens
        self._floor = min(MIN_PREFILL_TOKENS, self._limit)
        self._target_s = config.service.target_tbt_s
        self._arena = arena
        self._timer = None if costs is None else StepTime(costs, arena.page_size)

    def tokens(self, step: StepSoFar) -> int:
        """Prefill tokens of a step: what fits; a minimal chunk where decodes are late whatever it holds."""
        most = max(self._limit - len(step.draft.chunks), self._floor)
        timer = self._timer
        if timer is None or not (step.num_due or self._target_s or step.limit_s < inf):
            return most
        base = timer.shape(step.draft)
        parts = list(map(part_of, step.prefills))
        parts += map(part_of, islice(step.waiting.head(MAX_PARTS), MAX_PARTS))
        if len(step.waiting) > MAX_PARTS:
            parts.append(Part(0, most))
        known = step.draft.resident
        if not parts:
            return most
        least_s = timer.with_prefill(base, parts, self._floor, known)
        limit_s = min(step.limit_s, tightest_s(step.draft, step.track_of, self._target_s, least_s) / MARGIN)
        if limit_s == inf:
            return most
        if self._arena.num_available < PRESSED_SHARE * self._arena.pool.num_pages:
            most = max(self._floor, min(most, PRESSED_TOKENS))
        if least_s > limit_s:
            fewer = range(self._floor - FEW_TOKENS, 0, -FEW_TOKENS)
            fitting = (n for n in fewer if timer.with_prefill(base, parts, n, known) <= limit_s)
            return next(fitting, self._floor)
        return max(self._floor, timer.max_prefill(base, parts, limit_s, most, known))


def tightest_s(
    draft: PlanDraft, track_of: Mapping[Sequence, Track], target_s: float | None, least_s: float
) -> float:
    """The least time that a decode of the step leaves it; infinity for no limit.

    target_s: between tokens of live requests. least_s: what the step takes anyhow. A token that is late
    whatever the step holds is not hurried for, but its successor's pace is kept.
    """
    limit_s, now = inf, draft.now
    for chunk in draft.chunks:
        if chunk.n_new > 1:
            continue
        track = track_of[chunk.seq]
        if target_s is not None and not track.is_batch:
            limit_s = min(limit_s, target_s)
        due = track.due
        if due is not None:
            slack_s = due.next_token_s(chunk.seq.num_output, now) - now
            limit_s = min(limit_s, slack_s if slack_s >= least_s * MARGIN else due.pace_s)
    return limit_s
