"""Admission by adapter: the whole queue is in view, and nobody at its head is passed over for ever.

A request that n others precede is admitted among the first (n + 1) * (MAX_PASSED + 1), so nobody starves.
"""

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
    driver = driver_of(cluster)
    for request in requests:
        driver.add(request)
    while driver.scheduler.has_work:
        driver.step()
    return sum(len(plan.resident) for plan in driver.plans) / len(driver.plans), admitted_by(driver)


def driver_of(cluster: int | None, num_rows: int = 8) -> Driver:
    config = SchedulerConfig(max_num_seqs=num_rows, adapter_cluster=cluster, enable_prefix_caching=False)
    return Driver(config, pool_of(400, 16))


def admitted_by(driver: Driver) -> list[str]:
    """Names in the order of admission."""
    return list(dict.fromkeys(chunk.seq.request.request_id for plan in driver.plans for chunk in plan.chunks))


def test_those_who_share_an_adapter_are_found_however_deep_in_the_queue() -> None:
    requests = requests_of(600, 60, seed=1)
    apart, _ = run(requests, None)
    together, admitted = run(requests, 2)
    assert sorted(admitted) == sorted(request.request_id for request in requests)
    # Ten requests share each: a queue of 600 has them 60 apart, beyond what a look at its head would see.
    assert together < 0.4 * apart


def test_slots_go_to_the_adapter_that_most_of_the_waiting_share() -> None:
    driver = driver_of(1, num_rows=4)
    driver.add(request_of("long", 4, 60, adapter=adapter_of("a")))
    driver.step()
    for name in ("b0", "c0", "d0", "c1", "d1", "d2"):
        driver.add(request_of(name, 4, 2, adapter=adapter_of(name[0])))
    while driver.scheduler.has_work:
        driver.step()
    assert admitted_by(driver) == ["long", "d0", "d1", "d2", "c0", "c1", "b0"]


@settings(max_examples=20, deadline=None)
@given(num=st.integers(1, 80), cluster=st.integers(1, 4), seed=st.integers(0, 1000))
def test_where_no_two_share_an_adapter_nobody_is_passed_over(num: int, cluster: int, seed: int) -> None:
    rng = random.Random(seed)
    requests = [request_of(f"r{i}", 4, rng.randint(2, 8), adapter=adapter_of(f"a{i}")) for i in range(num)]
    _, admitted = run(requests, cluster)
    assert admitted == [request.request_id for request in requests]


@settings(max_examples=20, deadline=None)
@given(num_adapters=st.integers(1, 12), cluster=st.integers(1, 3), seed=st.integers(0, 1000))
def test_where_nobody_waits_nothing_changes(num_adapters: int, cluster: int, seed: int) -> None:
    plans = []
    for width in (None, cluster):
        driver = driver_of(width)
        for request in requests_of(60, num_adapters, seed):
            while driver.scheduler.stats().num_running == 8:
                driver.step()
            driver.add(request)
            driver.step()
        plans.append([[(c.seq.request.request_id, c.start, c.n_new) for c in p.chunks] for p in driver.plans])
    assert plans[0] == plans[1]


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
    for place, name in enumerate(admitted):
        assert place < (int(name[1:]) + 1) * (MAX_PASSED + 1) + 8
