"""Admission by adapter: the whole queue is in view, and nobody at its head is passed over for ever."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling_helpers import Driver, adapter_of, pool_of, request_of

from polybatch.config import SchedulerConfig
from polybatch.request import Request
from polybatch.scheduling.adapter_clusters import MAX_PASSED


def requests_of(num: int, num_adapters: int, seed: int) -> list[Request]:
    rng = random.Random(seed)
    adapters = [adapter_of(f"a{i}") for i in range(num_adapters)]
    return [
        request_of(f"r{i}", 4, rng.randint(2, 8), adapter=rng.choice([*adapters, None])) for i in range(num)
    ]


def run(requests: list[Request], cluster: int | None) -> tuple[float, list[str]]:
    """Distinct adapters per step, and names in the order of admission."""
    config = SchedulerConfig(max_num_seqs=8, adapter_cluster=cluster, enable_prefix_caching=False)
    driver = Driver(config, pool_of(400, 16))
    for request in requests:
        driver.add(request)
    admitted: dict[str, None] = {}
    while driver.scheduler.has_work:
        driver.step()
        admitted |= dict.fromkeys(chunk.seq.request.request_id for chunk in driver.plans[-1].chunks)
    return sum(len(plan.resident) for plan in driver.plans) / len(driver.plans), list(admitted)


def test_those_who_share_an_adapter_are_found_however_deep_in_the_queue() -> None:
    requests = requests_of(600, 60, seed=1)
    apart, _ = run(requests, None)
    together, admitted = run(requests, 2)
    assert sorted(admitted) == sorted(request.request_id for request in requests)
    # Ten requests share each: a queue of 600 has them 60 apart, beyond what a look at its head would see.
    assert together < 0.4 * apart


@settings(max_examples=10, deadline=None)
@given(num_adapters=st.integers(1, 12), cluster=st.integers(1, 3), seed=st.integers(0, 1000))
def test_whoever_is_first_is_passed_over_so_many_times_at_most(
    num_adapters: int, cluster: int, seed: int
) -> None:
    requests = requests_of(400, num_adapters, seed)
    _, admitted = run(requests, cluster)
    waiting = [request.request_id for request in requests]
    num_passed = 0
    for name in admitted:
        num_passed = 0 if name == waiting[0] else num_passed + 1
        waiting.remove(name)
        # The step that takes a bound's last also shows others that it admitted.
        assert num_passed <= MAX_PASSED + 8
