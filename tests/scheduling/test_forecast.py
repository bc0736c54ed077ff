"""Forecasts of a long queue: what neighbours are told together is what each would be told alone."""

from __future__ import annotations

import random

import pytest
from scheduling_helpers import Driver, pool_of, request_of

from polybatch.config import SchedulerConfig
from polybatch.request import Deadlines
from polybatch.scheduling import forecast
from polybatch.scheduling.costs import CostModel

COSTS = CostModel(base=0.01, per_token=0.0005, per_context=1e-6)


def told_last(num: int, policy: str) -> tuple[float, float]:
    """What the last of so many requests is told: seconds to its first and last token."""
    rng = random.Random(7)
    config = SchedulerConfig(max_num_seqs=16, policy=policy, enable_prefix_caching=False)
    driver = Driver(config, pool_of(400, 16), costs=COSTS)
    for i in range(num):
        deadlines = Deadlines(ttft_s=1e6)
        driver.add(request_of(f"r{i}", rng.randint(5, 300), rng.randint(5, 100), deadlines=deadlines))
        if i == 20:
            for _ in range(10):
                driver.step()
    answer = driver.scheduler.answer(f"r{num - 1}")
    assert answer is not None
    return answer.ttft_s, answer.e2e_s


@pytest.mark.parametrize("policy", ["fcfs", "deadline"])
def test_many_who_wait_are_told_the_same_together_as_one_by_one(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = told_last(400, policy)
    monkeypatch.setattr(forecast, "MAX_PARTIES", 400)
    assert together == pytest.approx(told_last(400, policy), rel=0.15)
