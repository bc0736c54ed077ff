"""Workflows of several calls with one deadline: what share of the time left a stage may have.

A stage's budget is the time until the workflow is due, in proportion of what this stage takes to what it and
the stages that are expected after it take; whoever may wait least goes first. What stages take is given, or
learned from those that have ended, from admission to end. A kind of which nothing is known counts as much as
the stage that is asked for, which makes for poor budgets.
Source: HexGen-Flow (Peng et al. 2025), stage budgets and urgency.
"""

from __future__ import annotations

from collections.abc import Iterable

WEIGHT = 0.1
"""Of the newest stage in the mean of its kind."""


class StageTimes:
    """Mean seconds of stages by kind."""

    def __init__(self, given: Iterable[tuple[str, float]] = ()) -> None:
        """given: kinds and means that stay as they are."""
        self._mean_s: dict[str, float] = dict(given)
        self._given = frozenset(self._mean_s)

    def observe(self, stage: str, seconds: float) -> None:
        if stage in self._given:
            return
        mean_s = self._mean_s.get(stage)
        self._mean_s[stage] = seconds if mean_s is None else mean_s + WEIGHT * (seconds - mean_s)

    def mean_s(self, stage: str, otherwise_s: float) -> float:
        """What a stage of this kind takes; `otherwise_s` where none has ended yet."""
        return self._mean_s.get(stage, otherwise_s)

    def budget_s(self, stage: str, remaining: Iterable[str], left_s: float, own_s: float) -> float:
        """Seconds that a stage may take, waiting included, of the `left_s` that its workflow has.

        own_s: what it is expected to take; also taken for kinds of which nothing is known.
        """
        rest_s = sum(self.mean_s(kind, own_s) for kind in remaining)
        total_s = own_s + rest_s
        return left_s * own_s / total_s if total_s > 0 else left_s
