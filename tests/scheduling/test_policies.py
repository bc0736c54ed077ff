"""Who goes first."""

from __future__ import annotations

import pytest
from scheduling_helpers import Driver, pool_of, request_of

from polybatch.config import SchedulerConfig
from polybatch.errors import ConfigError
from polybatch.scheduling.policies import policy_named


def order_of_finish(policy: str, priorities: list[int]) -> list[str]:
    driver = Driver(SchedulerConfig(max_num_seqs=1, policy=policy), pool_of(32))
    for index, priority in enumerate(priorities):
        driver.add(request_of(f"r{index}", 3, 2, priority=priority))
    finished = []
    while driver.scheduler.has_work:
        finished += [seq.request.request_id for seq in driver.step()]
    return finished


def test_fcfs_serves_in_order_of_arrival() -> None:
    assert order_of_finish("fcfs", [2, 1, 0]) == ["r0", "r1", "r2"]


def test_priority_serves_lower_numbers_first_and_equals_in_order_of_arrival() -> None:
    assert order_of_finish("priority", [2, 1, 0, 1]) == ["r2", "r1", "r3", "r0"]


def test_the_least_important_running_sequence_is_the_victim() -> None:
    driver = Driver(SchedulerConfig(policy="priority", enable_prefix_caching=False), pool_of(6, 2))
    late = driver.add(request_of("urgent", [1, 2, 3, 4], 8, priority=0))[0]
    driver.step()
    early = driver.add(request_of("offline", [5, 6, 7, 8], 8, priority=9))[0]
    driver.run()
    assert late.num_preemptions == 0
    assert early.num_preemptions > 0


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="fcfs, priority"):
        policy_named("lifo")
