"""What the engine counts: where its time goes, and what it has done."""

from __future__ import annotations

from dataclasses import dataclass, field

from polybatch.scheduling.deadlines import Attainment
from polybatch.scheduling.track import SchedulerStats


@dataclass(slots=True)
class StepTimes:
    """Seconds spent since the start, by phase, and what they were spent on.

    plan_s: scheduling. forward_s: building the batch and the forward pass. sample_s: logits to tokens.
    commit_s: bookkeeping of new tokens and pages. output_s: log-probabilities, text, stop strings and
    outputs. Their sum is the time inside `EngineCore.step`, but for the glue between.
    """

    num_steps: int = 0
    num_tokens: int = 0
    plan_s: float = 0.0
    forward_s: float = 0.0
    sample_s: float = 0.0
    commit_s: float = 0.0
    output_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.plan_s + self.forward_s + self.sample_s + self.commit_s + self.output_s

    @property
    def overhead(self) -> float:
        """Share of the time that is not the forward pass; 0 before the first step."""
        return 1.0 - self.forward_s / self.total_s if self.num_steps else 0.0


@dataclass(frozen=True, slots=True)
class CostStats:
    """How well steps are predicted.

    is_calibrated: by a profile of this machine and model, else learned from the first steps. num_steps: that
    were predicted. predicted_s, measured_s: of those, in all. median_error, p95_error: relative, of the last
    steps; 0 before the first. factors: measured over what the model alone says, by class of step.
    """

    is_calibrated: bool = False
    num_steps: int = 0
    predicted_s: float = 0.0
    measured_s: float = 0.0
    median_error: float = 0.0
    p95_error: float = 0.0
    factors: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class DeadlineCounts:
    """Requests that kept and that missed each kind of deadline; those without it count nowhere."""

    ttft_met: int = 0
    ttft_missed: int = 0
    tpot_met: int = 0
    tpot_missed: int = 0
    e2e_met: int = 0
    e2e_missed: int = 0

    def add(self, kept: Attainment) -> None:
        """Count a request that is over."""
        for name in ("ttft", "tpot", "e2e"):
            is_met = getattr(kept, name)
            if is_met is not None:
                counter = f"{name}_{'met' if is_met else 'missed'}"
                setattr(self, counter, getattr(self, counter) + 1)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot. Totals count since the start; aborted and failed requests count as finished."""

    times: StepTimes
    scheduler: SchedulerStats
    num_requests: int
    num_finished_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    costs: CostStats = field(default_factory=CostStats)
    deadlines: DeadlineCounts = field(default_factory=DeadlineCounts)
