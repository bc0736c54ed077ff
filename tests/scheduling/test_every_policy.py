"""One contract for all policies: whatever they decide, everything accepted ends and all laws hold.

The laws are asserted in `scheduling_helpers` on every plan, and `Scheduler.check` after every step.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling_helpers import Driver, adapter_of, pool_of, random_request, request_of

from polybatch.config import BATCHING, SchedulerConfig, ServiceLevels
from polybatch.errors import ConfigError, RequestError
from polybatch.request import Deadlines, FinishReason, Request, WorkflowStage
from polybatch.scheduling.costs import CostModel
from polybatch.scheduling.policies import BATCH_PRIORITY, POLICIES

COSTS = CostModel(base=0.01, per_token=0.001, per_context=1e-5, per_adapter=0.002)


def random_levels(rng: random.Random) -> ServiceLevels:
    return ServiceLevels(
        ttft_s=rng.choice([None, 0.05, 1.0]),
        tpot_s=rng.choice([None, 0.02]),
        e2e_s=rng.choice([None, 2.0]),
        target_tbt_s=rng.choice([None, 0.001, 0.03]),
        abort_late=rng.random() < 0.3,
        batch_slowdown=rng.choice([None, 0.0, 0.1]),
        max_batch_step_s=rng.choice([None, 0.001, 0.05]),
    )


def with_promises(request: Request, rng: random.Random, now: float) -> Request:
    """The request with what live ones may bring, or as a row of a batch."""
    times = [None, 0.03, 0.3, 3.0]
    if rng.random() < 0.3:
        request = replace(request, priority=BATCH_PRIORITY)
    if rng.random() < 0.6:
        request = replace(
            request, deadlines=Deadlines(rng.choice(times), rng.choice(times), rng.choice(times))
        )
    if rng.random() < 0.3:
        stage = rng.choice("abc")
        workflow = WorkflowStage(f"w{rng.randrange(4)}", stage, now + rng.uniform(-1, 5), tuple("bc"))
        request = replace(request, workflow=workflow)
    return replace(request, arrival_s=now, expected_tokens=rng.choice([None, 1, 5]))


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32), has_costs=st.booleans())
def test_every_accepted_request_ends_and_all_laws_hold(policy: str, seed: int, has_costs: bool) -> None:
    rng = random.Random(seed)
    config = SchedulerConfig(
        policy=policy,
        max_num_batched_tokens=rng.choice([3, 16, 64]),
        max_num_seqs=rng.choice([1, 4, 16]),
        max_model_len=64,
        enable_prefix_caching=rng.random() < 0.6,
        service=random_levels(rng),
        adapter_cluster=rng.choice([None, 1, 2]),
    )
    driver = Driver(
        config,
        pool_of(rng.choice([14, 40])),
        empty_every=rng.choice([0, 5]),
        costs=COSTS if has_costs else None,
    )
    adapters = [adapter_of(f"a{index}", index % 3) for index in range(4)]
    accepted = []
    for number in range(40):
        request = with_promises(random_request(rng, f"r{number}", adapters, 40), rng, driver.now)
        try:
            accepted += driver.add(request)
        except RequestError as error:
            assert "pages" in str(error)  # noqa: PT017
        if rng.random() < 0.1 and driver.live:
            driver.abort(rng.choice(driver.live).request.request_id)
        if rng.random() < 0.8:
            driver.step()
    driver.run(max_steps=5000)
    assert all(seq.finish_reason is not None for seq in accepted)
    if policy not in ("deadline", "early_abort"):
        assert not driver.given_up
    ended_well = {FinishReason.LENGTH, FinishReason.STOP}
    assert {seq.finish_reason for seq in accepted} <= ended_well | {FinishReason.ABORT}


@pytest.mark.parametrize("batching", BATCHING)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_way_of_filling_steps_finishes_everything(batching: str, seed: int) -> None:
    rng = random.Random(seed)
    config = SchedulerConfig(
        batching=batching, max_num_batched_tokens=rng.choice([8, 40]), max_num_seqs=8, max_model_len=64
    )
    driver = Driver(config, pool_of(30))
    for number in range(30):
        driver.add(random_request(rng, f"r{number}", [adapter_of("a")], 40))
        if rng.random() < 0.7:
            driver.step()
    driver.run(max_steps=5000)
    for plan in driver.plans:
        is_decode = [chunk.seq.num_prompt <= chunk.start and chunk.n_new == 1 for chunk in plan.chunks]
        if batching in ("prefill_first", "chunk_only") and any(chunk.n_new > 1 for chunk in plan.chunks):
            assert not any(is_decode) or any(chunk.seq.num_preemptions for chunk in plan.chunks)


@pytest.mark.parametrize("batching", ["prefill_first", "hybrid_only"])
def test_whole_prompts_are_cut_only_where_a_step_cannot_hold_them(batching: str) -> None:
    config = SchedulerConfig(batching=batching, max_num_batched_tokens=40, enable_prefix_caching=False)
    driver = Driver(config, pool_of(200))
    for number in range(5):
        driver.add(request_of(f"r{number}", 25, 3))
    driver.add(request_of("long", 90, 3))
    driver.run()
    sizes = {chunk.seq.request.request_id: [] for plan in driver.plans for chunk in plan.chunks}  # type: dict[str, list[int]]
    for plan in driver.plans:
        for chunk in plan.chunks:
            if chunk.start < chunk.seq.num_prompt:
                sizes[chunk.seq.request.request_id].append(chunk.n_new)
    assert all(sizes[f"r{number}"] == [25] for number in range(5))
    assert sum(sizes["long"]) == 90


def test_steps_of_prompts_alternate_with_steps_of_decodes_where_they_are_kept_apart() -> None:
    config = SchedulerConfig(batching="chunk_only", max_num_batched_tokens=10)
    driver = Driver(config, pool_of(200))
    driver.add(request_of("decoding", 5, 20))
    driver.step()
    driver.add(request_of("long", [7] * 50, 2))
    kinds = []
    for _ in range(8):
        driver.step()
        kinds.append(driver.plans[-1].chunks[0].n_new > 1)
    assert kinds[:6] in ([True, False] * 3, [False, True] * 3)
    driver.run()


def test_the_names_are_listed_once_and_an_unknown_one_is_refused_with_them() -> None:
    with pytest.raises(ConfigError, match=", ".join(POLICIES)):
        SchedulerConfig(policy="lifo")
    with pytest.raises(ConfigError, match="stall_free"):
        SchedulerConfig(batching="none")
    assert all(policy.summary for policy in POLICIES.values())


def test_service_levels_refuse_what_is_no_time_and_what_nobody_knows() -> None:
    with pytest.raises(ConfigError, match="ttft_s is -1"):
        ServiceLevels(ttft_s=-1)
    with pytest.raises(ConfigError, match="batch_slowdown"):
        ServiceLevels(batch_slowdown=-0.5)
    with pytest.raises(ConfigError, match="ttft_ms"):
        ServiceLevels.of({"ttft_ms": 5})
    assert ServiceLevels.of({"ttft_s": 2.0}) == ServiceLevels(ttft_s=2.0)
