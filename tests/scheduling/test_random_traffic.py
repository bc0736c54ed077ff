"""Laws of the scheduler under random traffic, on a device that checks every read.

The laws themselves are asserted in `scheduling_helpers`: exact page accounting after every step, every read
finds what its own sequence would have written, adapter pages hold the adapter, no decode is skipped,
the prefill budget holds, the first in order progresses, prompt logits come exactly once.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduling_helpers import Driver, adapter_of, pool_of, random_request, request_of

from polybatch.config import SchedulerConfig
from polybatch.errors import ConfigError, RequestError
from polybatch.request import FinishReason, SequenceStatus

configs = st.builds(
    SchedulerConfig,
    max_num_batched_tokens=st.sampled_from([1, 3, 8, 40]),
    max_num_seqs=st.sampled_from([1, 2, 5, 16]),
    max_model_len=st.just(64),
    policy=st.sampled_from(["fcfs", "priority", "fair"]),
    enable_prefix_caching=st.booleans(),
)


def run_traffic(driver: Driver, rng: random.Random, num_steps: int, max_len: int) -> None:
    adapters = [adapter_of(f"a{index}", index % 4) for index in range(6)]
    num_added = 0
    for _ in range(num_steps):
        if rng.random() < 0.4:
            try:
                driver.add(random_request(rng, f"r{num_added}", adapters, max_len))
                num_added += 1
            except RequestError as error:
                assert "pages" in str(error)  # noqa: PT017
        if rng.random() < 0.05 and driver.live:
            driver.abort(rng.choice(driver.live).request.request_id)
        driver.step()
    driver.run()


@settings(max_examples=40, deadline=None)
@given(
    configs,
    st.integers(0, 2**32),
    st.integers(8, 60),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([0, 5]),
)
def test_every_accepted_request_finishes_and_all_laws_hold(
    config: SchedulerConfig, seed: int, num_pages: int, page_size: int, empty_every: int
) -> None:
    driver = Driver(config, pool_of(num_pages, page_size), empty_every=empty_every)
    run_traffic(driver, random.Random(seed), 60, min(48, num_pages * page_size))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.sampled_from(["fcfs", "priority", "fair"]))
def test_heavy_preemption_never_livelocks(seed: int, enable_prefix_caching: bool, policy: str) -> None:
    config = SchedulerConfig(
        max_num_batched_tokens=64, policy=policy, enable_prefix_caching=enable_prefix_caching
    )
    driver = Driver(config, pool_of(10, 2))
    rng = random.Random(seed)
    sequences = []
    for index in range(12):
        # Each alone may take the whole pool, and prompts are short, so that many are admitted together.
        request = request_of(f"r{index}", [rng.randrange(9)], 20, priority=rng.randrange(3))
        sequences += driver.add(request)
    driver.run(max_steps=2000)
    assert sum(seq.num_preemptions for seq in sequences) > 0
    assert all(seq.num_output == 20 for seq in sequences)
    assert sequences[0].num_preemptions == 0 or policy == "priority"


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of calls an engine may make."""

    @initialize(config=configs, num_pages=st.integers(10, 40), page_size=st.sampled_from([1, 3, 4]))
    def start(self, config: SchedulerConfig, num_pages: int, page_size: int) -> None:
        self.driver = Driver(config, pool_of(num_pages, page_size))
        self.max_len = min(40, num_pages * page_size)
        self.adapters = [adapter_of(f"a{index}", index % 4) for index in range(5)]
        self.num_added = 0

    @rule(seed=st.integers(0, 2**32))
    def add(self, seed: int) -> None:
        request = random_request(random.Random(seed), f"r{self.num_added}", self.adapters, self.max_len)
        self.num_added += 1
        try:
            sequences = self.driver.add(request)
        except RequestError as error:
            assert "pages" in str(error)  # noqa: PT017
        else:
            assert len(sequences) == request.params.n

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.driver.step()

    @precondition(lambda self: self.driver.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.driver.live))
        ended = self.driver.abort(seq.request.request_id)
        assert seq in ended
        assert all(seq.finish_reason is FinishReason.ABORT and not seq.pages for seq in ended)
        assert self.driver.scheduler.abort(seq.request.request_id) == []

    @precondition(lambda self: self.driver.live)
    @rule(data=st.data())
    def abort_while_a_step_runs(self, data: st.DataObject) -> None:
        plan = self.driver.plan()
        assert plan is not None
        result = self.driver.device.execute(plan)
        seq = data.draw(st.sampled_from(self.driver.live))
        num_tokens = seq.num_tokens
        self.driver.abort(seq.request.request_id)
        self.driver.scheduler.commit(plan, result)
        self.driver.forget_ended()
        assert seq.num_tokens == num_tokens

    @precondition(lambda self: self.driver.live)
    @rule(data=st.data(), reason=st.sampled_from([FinishReason.STOP, FinishReason.ERROR]))
    def finish(self, data: st.DataObject, reason: FinishReason) -> None:
        seq = data.draw(st.sampled_from(self.driver.live))
        self.driver.scheduler.finish(seq, reason, "###")
        assert (seq.status, seq.finish_reason) == (SequenceStatus.FINISHED, reason)
        assert seq.stop_reason == "###"
        self.driver.forget_ended()

    @precondition(lambda self: self.driver.live)
    @rule()
    def fail_a_step(self) -> None:
        plan = self.driver.plan()
        assert plan is not None
        ended = self.driver.scheduler.discard(plan)
        assert ended == [chunk.seq for chunk in plan.chunks]
        self.driver.forget_ended()

    @rule(index=st.integers(0, 4))
    def pin(self, index: int) -> None:
        try:
            self.driver.scheduler.pin(self.adapters[index])
        except ConfigError as error:
            assert "pin fewer" in str(error)  # noqa: PT017

    @rule(index=st.integers(0, 4))
    def unpin(self, index: int) -> None:
        self.driver.scheduler.unpin(self.adapters[index].digest)

    @invariant()
    def laws_hold(self) -> None:
        if hasattr(self, "driver"):
            self.driver.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.run(20_000)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


def test_500_adapters_share_room_for_20() -> None:
    rng = random.Random(7)
    adapters = [adapter_of(f"a{index}", 1 + index % 8) for index in range(500)]
    driver = Driver(
        SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=12, max_model_len=64), pool_of(90 + 40)
    )
    for index in range(400):
        request = request_of(
            f"r{index}",
            [rng.randrange(1, 4) for _ in range(rng.randint(1, 20))],
            rng.randint(1, 12),
            adapter=adapters[int(500 * rng.random() ** 3)],
        )
        driver.add(request)
        if rng.random() < 0.7:
            driver.step()
    driver.run()
    stats = driver.scheduler.stats()
    assert stats.num_adapter_loads > 100
    assert stats.num_resident_adapters < 60


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_20000_requests_of_500_adapters(policy: str) -> None:
    rng = random.Random(11)
    adapters = [adapter_of(f"a{index}", 1 + index % 8) for index in range(500)]
    config = SchedulerConfig(max_num_batched_tokens=96, max_num_seqs=48, max_model_len=64, policy=policy)
    driver = Driver(config, pool_of(320), check_every=50, empty_every=997)
    num_finished = 0
    for index in range(20_000):
        driver.add(random_request(rng, f"r{index}", adapters, 48))
        while len(driver.live) > 150:
            num_finished += len(driver.step())
            if rng.random() < 0.002 and driver.live:
                driver.abort(rng.choice(driver.live).request.request_id)
        driver.plans.clear()
    driver.run()
    stats = driver.scheduler.stats()
    assert num_finished > 20_000
    assert stats.num_preemptions > 0
    assert stats.num_prefix_hit_tokens > 0


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(configs, st.integers(0, 2**32), st.integers(8, 60), st.sampled_from([1, 2, 4, 8]))
def test_all_laws_hold_for_long(config: SchedulerConfig, seed: int, num_pages: int, page_size: int) -> None:
    driver = Driver(config, pool_of(num_pages, page_size), empty_every=7)
    run_traffic(driver, random.Random(seed), 150, min(48, num_pages * page_size))
