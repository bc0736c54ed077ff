"""Equal service for tenants who have work waiting (Sheng et al. 2024, lemma 4.3 and theorem 4.4)."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling_helpers import Driver, pool_of, request_of

from polybatch.config import SchedulerConfig
from polybatch.request import Request, Sequence, SequenceStatus
from polybatch.scheduling.policies import BATCH_PRIORITY
from polybatch.scheduling.policies.fair import INPUT_WEIGHT, OUTPUT_WEIGHT, FairQueue

MAX_PROMPT, MAX_OUTPUT = 12, 16


class Ledger(Driver):
    """Counts, from the outside, what each tenant was given."""

    def __init__(self, config: SchedulerConfig, num_pages: int) -> None:
        super().__init__(config, pool_of(num_pages))
        self.service: Counter[str] = Counter()
        self.finished: list[Sequence] = []
        self._seen: set[Sequence] = set()

    @property
    def queue(self) -> FairQueue:
        queue = self.scheduler._tracks.waiting
        assert isinstance(queue, FairQueue)
        return queue

    def step(self) -> list[Sequence]:
        before = {seq: seq.num_output for seq in self.live}
        plan = self.plan()
        if plan is None:
            return []
        for seq in before:
            if seq.status is SequenceStatus.RUNNING and seq not in self._seen:
                self._seen.add(seq)
                self.service[seq.request.tenant] += INPUT_WEIGHT * (seq.num_prompt - seq.num_cached)
        finished = self.complete(plan)
        for seq, num_output in before.items():
            self.service[seq.request.tenant] += OUTPUT_WEIGHT * (seq.num_output - num_output)
        self.finished += finished
        return finished


def random_call(rng: random.Random, tenant: str, number: int) -> Request:
    prompt = [rng.randrange(50) for _ in range(rng.randint(1, MAX_PROMPT))]
    return request_of(f"{tenant}{number}", prompt, rng.randint(1, MAX_OUTPUT), tenant=tenant)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    max_num_seqs=st.sampled_from([1, 2, 6]),
    num_pages=st.sampled_from([10, 20, 200]),
    budget=st.sampled_from([4, 40]),
    caching=st.booleans(),
)
def test_two_backlogged_tenants_are_served_alike_within_the_bound(
    seed: int, max_num_seqs: int, num_pages: int, budget: int, caching: bool
) -> None:
    """A sends rarely but long, B floods, C comes and goes."""
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, max_model_len=40, policy="fair",
        enable_prefix_caching=caching,
    )  # fmt: skip
    ledger, rng = Ledger(config, num_pages), random.Random(seed)
    bound = max(INPUT_WEIGHT * MAX_PROMPT, OUTPUT_WEIGHT * max_num_seqs * (MAX_PROMPT + MAX_OUTPUT))
    counts: Counter[str] = Counter()
    backlogged_since: dict[str, int] = {}
    history: list[Counter[str]] = []
    for step in range(100):
        for tenant, rate in (("a", 0.3), ("b", 1.0), ("c", 0.6 if step % 50 < 20 else 0.0)):
            if rng.random() < rate:
                ledger.add(random_call(rng, tenant, counts[tenant]))
                counts[tenant] += 1
        ledger.step()
        history.append(ledger.service.copy())
        waiting = [tenant for _, tenant in ledger.queue.waiting]
        backlogged_since = {tenant: backlogged_since.get(tenant, step) for tenant in waiting}
        counters = {tenant: count for (_, tenant), count in ledger.queue.counters.items()}
        for one in waiting:
            for other in waiting:
                assert counters[one] - counters[other] <= bound
                since = max(backlogged_since[one], backlogged_since[other])
                gained = [history[-1][t] - history[since][t] for t in (one, other)]
                assert abs(gained[0] - gained[1]) <= 2 * bound
    ledger.run()
    assert len(ledger.finished) == sum(counts.values())


def finish_order(policy: str) -> list[str]:
    """B floods first; A's few requests come after all of them."""
    driver = Driver(SchedulerConfig(max_num_seqs=2, policy=policy, enable_prefix_caching=False), pool_of(64))
    for number in range(30):
        driver.add(request_of(f"b{number}", 4, 4, tenant="b"))
    driver.step()
    for number in range(3):
        driver.add(request_of(f"a{number}", 4, 4, tenant="a"))
    order = []
    while driver.scheduler.has_work:
        order += [seq.request.request_id for seq in driver.step()]
    return order


def test_a_flood_delays_its_sender_and_not_the_others() -> None:
    assert max(finish_order("fcfs").index(f"a{number}") for number in range(3)) == 32
    assert max(finish_order("fair").index(f"a{number}") for number in range(3)) < 10


def test_a_tenant_alone_is_served_first_come_first_served_at_full_speed() -> None:
    for policy in ("fcfs", "fair"):
        driver = Driver(SchedulerConfig(max_num_seqs=4, policy=policy), pool_of(64))
        for number in range(12):
            driver.add(request_of(f"r{number}", 4, 3, tenant="only"))
        driver.run()
        sizes = [len(plan.chunks) for plan in driver.plans]
        ids = [[chunk.seq.request.request_id for chunk in plan.chunks] for plan in driver.plans]
        if policy == "fcfs":
            expected = (sizes, ids)
        assert (sizes, ids) == expected


def test_time_without_work_is_not_saved_up() -> None:
    ledger = Ledger(SchedulerConfig(max_num_seqs=1, policy="fair", enable_prefix_caching=False), 64)
    for number in range(20):
        ledger.add(request_of(f"b{number}", 4, 4, tenant="b"))
    for _ in range(40):
        ledger.step()
    spent = ledger.queue.counters[False, "b"]
    assert spent > 50
    for number in range(10):
        ledger.add(request_of(f"a{number}", 4, 4, tenant="a"))
    assert ledger.queue.counters[False, "a"] == spent
    served = ledger.service.copy()
    for _ in range(32):
        ledger.step()
    gained = ledger.service - served
    assert abs(gained["a"] - gained["b"]) <= 2 * (4 + 2 * 4)


def test_an_empty_queue_remembers_who_was_served_last() -> None:
    ledger = Ledger(SchedulerConfig(policy="fair"), 64)
    ledger.add(request_of("b", 4, 4, tenant="b"))
    ledger.run()
    ledger.add(request_of("a", 4, 4, tenant="a"))
    assert ledger.queue.counters[False, "a"] == ledger.queue.counters[False, "b"] > 0


def test_the_last_admitted_yields_first_even_if_it_arrived_before() -> None:
    """Else a flood that arrived early would preempt everybody who came after it."""
    config = SchedulerConfig(max_num_seqs=2, policy="fair", enable_prefix_caching=False)
    driver = Driver(config, pool_of(7, 4))
    flood = [driver.add(request_of(f"b{number}", 4, 12, tenant="b"))[0] for number in range(4)]
    driver.step()
    light = driver.add(request_of("a", 4, 12, tenant="a"))[0]
    driver.run()
    assert light.num_preemptions == 0
    assert sum(seq.num_preemptions for seq in flood) > 0


def test_aborted_requests_leave_no_trace_in_the_queue() -> None:
    ledger = Ledger(SchedulerConfig(max_num_seqs=1, policy="fair"), 64)
    for tenant in "abc":
        ledger.add(request_of(tenant, 4, 4, tenant=tenant))
    for tenant in "cab":
        ledger.abort(tenant)
    assert not ledger.queue.waiting
    assert len(ledger.queue) == 0
    assert ledger.queue.counters == {(False, "a"): 0, (False, "b"): 0, (False, "c"): 0}


def test_rows_of_batches_wait_for_everybody_else_and_cost_their_tenant_nothing_there() -> None:
    ledger = Ledger(SchedulerConfig(max_num_seqs=1, policy="fair", enable_prefix_caching=False), 64)
    for number in range(3):
        ledger.add(request_of(f"row{number}", 4, 4, tenant="a", priority=BATCH_PRIORITY))
    ledger.step()
    for number in range(3):
        ledger.add(request_of(f"b{number}", 4, 4, tenant="b"))
        ledger.add(request_of(f"a{number}", 4, 4, tenant="a"))
    ledger.run()
    order = [seq.request.request_id for seq in ledger.finished]
    assert sorted(order[:6]) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert [name[0] for name in order[:6]] in (list("ababab"), list("bababa"))
    assert order[6:] == ["row0", "row1", "row2"]
