"""Rows of batches make way for live requests under every policy, and finish all the same."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling_helpers import Driver, adapter_of, pool_of, random_request, request_of

from polybatch.config import SchedulerConfig
from polybatch.request import SequenceStatus
from polybatch.scheduling.policies import BATCH_PRIORITY

POLICIES = ("fcfs", "priority", "fair")


def with_rows(policy: str, num_rows: int, pages: int = 100, **settings: int) -> tuple[Driver, list]:
    """A driver that runs rows of 20 tokens to be generated each."""
    driver = Driver(SchedulerConfig(policy=policy, **settings), pool_of(pages))
    rows = [
        driver.add(request_of(f"row{i}", [i + 1] * 8, 20, priority=BATCH_PRIORITY))[0]
        for i in range(num_rows)
    ]
    for _ in range(4):
        driver.step()
    assert all(row.status is SequenceStatus.RUNNING for row in rows)
    return driver, rows


@pytest.mark.parametrize("policy", POLICIES)
def test_a_live_request_takes_a_slot_from_the_last_row_at_once(policy: str) -> None:
    driver, rows = with_rows(policy, 3, max_num_seqs=3)
    (live,) = driver.add(request_of("live", 5, 3))
    plan = driver.plan()
    assert plan is not None
    assert live in {chunk.seq for chunk in plan.chunks}
    assert plan.preempted == (rows[-1],)
    driver.complete(plan)
    driver.run()
    assert [row.num_preemptions for row in rows] == [0, 0, 1]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_live_request_takes_pages_from_rows_at_once(policy: str) -> None:
    driver, rows = with_rows(policy, 3, pages=12)
    (live,) = driver.add(request_of("live", 30, 2))
    plan = driver.plan()
    assert plan is not None
    assert live in {chunk.seq for chunk in plan.chunks}
    assert set(plan.preempted) == set(rows[1:])
    driver.complete(plan)
    driver.run()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_long_row_does_not_take_a_steps_tokens_from_live_requests(policy: str) -> None:
    driver = Driver(SchedulerConfig(policy=policy, max_num_batched_tokens=10), pool_of(200))
    driver.add(request_of("row", 100, 2, priority=BATCH_PRIORITY))
    driver.step()
    (live,) = driver.add(request_of("live", [7] * 6, 2))
    plan = driver.plan()
    assert plan is not None
    assert [(chunk.seq.request.request_id, chunk.n_new) for chunk in plan.chunks] == [("live", 6), ("row", 4)]
    driver.complete(plan)
    driver.run()
    assert live.num_preemptions == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_never_take_anything_from_live_requests(policy: str) -> None:
    driver = Driver(SchedulerConfig(policy=policy, max_num_seqs=2), pool_of(100))
    live = [driver.add(request_of(f"live{i}", [i + 1] * 8, 20))[0] for i in range(2)]
    driver.step()
    (row,) = driver.add(request_of("row", 8, 2, priority=BATCH_PRIORITY))
    while not all(seq.status is SequenceStatus.FINISHED for seq in live):
        assert row.num_computed == 0 or any(seq.status is SequenceStatus.FINISHED for seq in live)
        driver.step()
    driver.run()
    assert all(seq.num_preemptions == 0 for seq in live)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(POLICIES), st.integers(0, 2**32), st.integers(10, 40), st.sampled_from([1, 3, 8]),
    st.booleans(),
)  # fmt: skip
def test_live_requests_and_rows_all_finish(
    policy: str, seed: int, num_pages: int, max_num_seqs: int, is_caching: bool
) -> None:
    rng = random.Random(seed)
    adapters = [adapter_of(f"a{index}", index % 3) for index in range(4)]
    config = SchedulerConfig(
        policy=policy, max_num_seqs=max_num_seqs, max_num_batched_tokens=rng.choice([4, 16]),
        max_model_len=64, enable_prefix_caching=is_caching,
    )  # fmt: skip
    driver = Driver(config, pool_of(num_pages), empty_every=rng.choice([0, 5]))
    for number in range(40):
        request = random_request(rng, f"r{number}", adapters, 24)
        driver.add(replace(request, priority=BATCH_PRIORITY) if rng.random() < 0.6 else request)
        driver.step()
    driver.run()
