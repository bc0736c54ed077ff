"""A cost model that follows the machine: a factor per class of step, or a model learned from scratch.

A fitted model is right about what steps cost beside each other; how fast the machine is today (its clock,
what else runs on it, how rows are sampled) moves slowly and moves all steps of a class alike. Each measured
step moves its class's factor by a small power of measured over predicted, clipped, so that a step that waited
for something else moves it by a few percent at most. Where nothing was calibrated, the first steps are
remembered and a model is fitted to them again and again, rough at first.
"""

from __future__ import annotations

from collections import deque

from polybatch.scheduling.cost_fit import Sample, fit, quantile
from polybatch.scheduling.costs import CostModel, StepShape

PRIOR = CostModel(base=0.005, per_token=1e-4, per_context=1e-8, per_pair=1e-9, per_load_page=1e-5)
"""Before the first step; only its proportions matter after it."""

GAIN = 0.05
"""Share of a step's logarithmic error that its class's factor takes over."""

MAX_RATIO = 1.5
"""A single step counts as at most so many times slower or faster than predicted."""

MAX_FACTOR = 16.0

LEARN_AT = tuple(1 << power for power in range(14))
"""Numbers of steps at which a model that was not calibrated is made again."""

MIN_FITTED = 16
"""Steps that a fit needs; before, the prior is scaled."""

MAX_REMEMBERED = 256


def class_of(shape: StepShape) -> str:
    """Steps of one class drift together: "decode", or "mixed" where any prompt is computed."""
    return "mixed" if shape.num_prefills else "decode"


class OnlineCost:
    """`StepCosts` that learn from the steps that were measured. model: a calibrated one, None to learn."""

    def __init__(self, model: CostModel | None = None) -> None:
        self.is_calibrated = model is not None
        self.model = PRIOR if model is None else model
        self.factors = {"decode": 1.0, "mixed": 1.0}
        self.num_observed = 0
        self._num_of = {"decode": 0, "mixed": 0}
        self._least_s = 0.0
        """What a model that was learned may not go below, for steps unlike all that it has seen."""
        self._seen: deque[Sample] = deque(maxlen=MAX_REMEMBERED)

    @property
    def is_ready(self) -> bool:
        """Whether predictions are worth showing: calibrated, or fitted to the first steps."""
        return self.is_calibrated or self.num_observed >= MIN_FITTED

    def predict(self, shape: StepShape) -> float:
        """Seconds of a step of this shape."""
        return max(self._least_s, self.model.predict(shape)) * self.factors[class_of(shape)]

    def observe(self, shape: StepShape, seconds: float) -> None:
        """A step of this shape took so long."""
        if seconds <= 0:
            return
        self.num_observed += 1
        if not self.is_calibrated:
            self._seen.append(Sample(shape, seconds))
            if self.num_observed in LEARN_AT:
                self._learn()
                return
        kind = class_of(shape)
        factor, count = self.factors[kind], self._num_of[kind]
        self._num_of[kind] = count + 1
        ratio = seconds / self.predict(shape)
        # The first steps say most of how the machine is today.
        gain = max(GAIN, 0.5 / (count + 1))
        factor *= min(MAX_RATIO, max(1 / MAX_RATIO, ratio)) ** gain
        self.factors[kind] = min(MAX_FACTOR, max(1 / MAX_FACTOR, factor))

    def _learn(self) -> None:
        if self.num_observed < MIN_FITTED:
            scale = quantile([sample.seconds / PRIOR.predict(sample.shape) for sample in self._seen], 0.5)
            self.factors = dict.fromkeys(self.factors, scale)
            return
        self._least_s = 0.5 * min(sample.seconds for sample in self._seen)
        self.model = fit(list(self._seen), hinges=())
        self.factors = dict.fromkeys(self.factors, 1.0)
