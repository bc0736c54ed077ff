"""Predictions follow the machine, and no single step leads them astray."""

from __future__ import annotations

import random

import pytest
from test_cost_fit import TRUTH, random_shape

from polybatch.scheduling.cost_fit import quantile
from polybatch.scheduling.costs import StepShape
from polybatch.scheduling.online_cost import MAX_FACTOR, MIN_FITTED, OnlineCost

DECODE = StepShape(num_tokens=8, num_decodes=8, decode_context=4000, num_logits=8)
MIXED = StepShape(num_tokens=40, num_decodes=8, num_prefill_tokens=32, num_prefills=1, num_logits=8)


def test_drift_is_followed_per_class() -> None:
    costs = OnlineCost(TRUTH)
    for _ in range(100):
        costs.observe(DECODE, 2 * TRUTH.predict(DECODE))
        costs.observe(MIXED, 0.8 * TRUTH.predict(MIXED))
    assert costs.predict(DECODE) == pytest.approx(2 * TRUTH.predict(DECODE), rel=0.02)
    assert costs.predict(MIXED) == pytest.approx(0.8 * TRUTH.predict(MIXED), rel=0.02)


def test_a_single_slow_step_moves_predictions_by_a_few_percent() -> None:
    costs = OnlineCost(TRUTH)
    for _ in range(50):
        costs.observe(DECODE, TRUTH.predict(DECODE))
    before = costs.predict(DECODE)
    costs.observe(DECODE, 100 * before)
    assert before < costs.predict(DECODE) < 1.03 * before


def test_one_slow_step_in_ten_does_not_hide_the_usual_one() -> None:
    costs = OnlineCost(TRUTH)
    usual = TRUTH.predict(DECODE)
    for i in range(500):
        costs.observe(DECODE, usual * (20 if i % 10 == 0 else 1))
    assert costs.predict(DECODE) == pytest.approx(usual, rel=0.1)


def test_factors_stay_within_bounds() -> None:
    costs = OnlineCost(TRUTH)
    for _ in range(2000):
        costs.observe(DECODE, 1e6)
        costs.observe(MIXED, 1e-9)
    assert costs.factors == {"decode": MAX_FACTOR, "mixed": 1 / MAX_FACTOR}


def test_a_step_without_time_teaches_nothing() -> None:
    costs = OnlineCost(TRUTH)
    costs.observe(DECODE, 0.0)
    assert (costs.num_observed, costs.predict(DECODE)) == (0, TRUTH.predict(DECODE))


def test_without_calibration_the_first_step_sets_the_scale() -> None:
    costs = OnlineCost()
    assert not costs.is_ready
    costs.observe(DECODE, 1.5)
    assert costs.predict(DECODE) == pytest.approx(1.5)
    assert costs.predict(MIXED) > 0


def test_without_calibration_a_model_is_learned_from_steps() -> None:
    rng = random.Random(3)
    costs = OnlineCost()
    for _ in range(256):
        shape = random_shape(rng)
        costs.observe(shape, TRUTH.predict(shape) * rng.uniform(0.95, 1.05))
    assert costs.is_ready
    shapes = [random_shape(rng) for _ in range(50)]
    errors = [abs(costs.predict(shape) / TRUTH.predict(shape) - 1) for shape in shapes]
    assert quantile(errors, 0.9) < 0.2


def test_a_step_unlike_all_that_were_seen_still_takes_time() -> None:
    costs = OnlineCost()
    for _ in range(2 * MIN_FITTED):
        costs.observe(DECODE, 0.01)
    prefill = StepShape(num_tokens=2, num_prefill_tokens=2, num_prefills=1)
    assert costs.predict(prefill) > 0.001
    costs.observe(prefill, 0.02)


def test_it_is_ready_when_it_was_calibrated_or_has_seen_enough() -> None:
    assert OnlineCost(TRUTH).is_ready
    costs = OnlineCost()
    for i in range(MIN_FITTED):
        assert not costs.is_ready, i
        costs.observe(DECODE, 0.01)
    assert costs.is_ready
    assert costs.predict(DECODE) == pytest.approx(0.01, rel=0.05)
