"""How fast steps are at the moment: what a token of prompt and a token of output take.

From the cost model and the last step where there is one, else measured from the times between plans.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from polybatch.scheduling.costs import StepCosts, StepShape
from polybatch.scheduling.plan import StepPlan
from polybatch.scheduling.step_time import Part, StepTime

if TYPE_CHECKING:
    from polybatch.config import SchedulerConfig

REFRESH_STEPS = 16
"""Steps between two looks at the cost model: what it says of a batch changes slowly."""

WEIGHT = 0.05
"""Of the newest step in moving averages."""


class Pace:
    """Seconds per step and per token.

    step_s: of a step that only decodes, as large as the last. grain_s: what a token of prefill adds to it.
    budget: tokens of prefill that a step carries. mean_s: of steps as they were, prefill included.
    All are 0 where nothing is known yet.
    """

    def __init__(self, config: SchedulerConfig, page_size: int, costs: StepCosts | None) -> None:
        self._most = config.max_num_batched_tokens
        self._target_s = config.service.target_tbt_s
        self._timer = None if costs is None else StepTime(costs, page_size)
        self.step_s = self.grain_s = self.mean_s = 0.0
        self.budget = self._most
        self._last: StepPlan | None = None
        self._planned_s: float | None = None
        self._num_steps = 0
        self._base = StepShape()
        self._refresh(self._base)

    @property
    def is_known(self) -> bool:
        return self.step_s > 0

    def prefill_s(self, num_tokens: int) -> float:
        """Seconds until so many tokens of prompts are computed, if nothing else is."""
        return -(-num_tokens // self.budget) * self.step_s + num_tokens * self.grain_s

    @property
    def full_s(self) -> float:
        """Seconds of a step with as much prefill as it carries."""
        return self.step_s + self.budget * self.grain_s

    def decode_s(self, num_seqs: int) -> float:
        """Seconds of a step in which so many sequences decode, each with the context that they have now."""
        if self._timer is None or num_seqs <= self._base.num_decodes:
            return self.step_s
        context = self._base.decode_context // max(1, self._base.num_decodes)
        return self._timer.costs.predict(
            StepShape(
                num_tokens=num_seqs,
                num_decodes=num_seqs,
                decode_context=context * num_seqs,
                num_logits=num_seqs,
            )
        )

    def begin(self, now: float) -> None:
        """A step is about to be planned: the one before is over."""
        if self._last is not None and self._planned_s is not None:
            self._measure(self._last, now - self._planned_s)
        self._planned_s = now

    def served(self, plan: StepPlan) -> None:
        self._last = plan

    def rest(self) -> None:
        """Nothing is left to do: the time until the next step is nobody's."""
        self._last = None

    def _measure(self, plan: StepPlan, seconds: float) -> None:
        self.mean_s += (seconds - self.mean_s) * (WEIGHT if self.mean_s else 1.0)
        self._num_steps += 1
        if self._timer is not None:
            if self._num_steps % REFRESH_STEPS == 1:
                decodes = [chunk for chunk in plan.chunks if chunk.n_new == 1]
                context = sum(chunk.start + 1 for chunk in decodes)
                self._refresh(
                    StepShape(num_tokens=len(decodes), num_decodes=len(decodes), decode_context=context)
                )
            return
        num_prefill = plan.num_tokens - len(plan.chunks)
        if num_prefill == 0:
            self.step_s += (seconds - self.step_s) * (WEIGHT if self.step_s else 1.0)
        elif num_prefill >= self._most // 8:
            grain_s = max(0.0, seconds - self.step_s) / num_prefill
            self.grain_s += (grain_s - self.grain_s) * (WEIGHT if self.grain_s else 1.0)

    def _refresh(self, base: StepShape) -> None:
        """Ask the cost model about steps with these decodes."""
        timer = self._timer
        if timer is None:
            return
        self._base = base
        self.step_s = timer.costs.predict(base)
        parts = [Part(0, self._most)]
        target_s = inf if self._target_s is None else self._target_s
        self.budget = max(1, timer.max_prefill(base, parts, max(target_s, self.step_s), self._most))
        self.grain_s = max(0.0, timer.with_prefill(base, parts, self.budget) - self.step_s) / self.budget
