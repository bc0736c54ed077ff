"""How much of a long list the next plan has to know: with the rest it would be the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling_helpers import adapter_of, pool_of, request_of

from polybatch.config import SchedulerConfig, ServiceLevels
from polybatch.errors import RequestError
from polybatch.request import AdapterRef, Request
from polybatch.scheduling.composer import PREFETCH_DEPTH
from polybatch.scheduling.plan import StepPlan, StepResult
from polybatch.scheduling.policies import POLICIES
from polybatch.scheduling.scheduler import Scheduler

ROWS = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 5), st.sampled_from([None, None, "a", "b", "c"])),
    min_size=1,
    max_size=40,
)


def requests_of(rows: list[tuple[int, int, str | None]], name: str, first: int = 1000) -> list[Request]:
    """Prompts that share nothing. first: token of the first of them."""
    return [
        request_of(
            f"{name}{index}",
            [first + index, *range(1, length)],
            max_tokens,
            adapter=None if adapter is None else adapter_of(adapter),
        )
        for index, (length, max_tokens, adapter) in enumerate(rows)
    ]


def content(plan: StepPlan | None) -> Any:
    assert plan is not None
    chunks = [(c.seq.request.request_id, c.start, c.n_new, c.logits, c.seq.pages) for c in plan.chunks]
    return chunks, plan.num_decodes, plan.copies, plan.loads, plan.resident, len(plan.preempted)


@given(
    ROWS,
    ROWS,
    st.integers(0, 4),
    st.integers(1, 12),
    st.integers(4, 64),
    st.sampled_from(["fcfs", "priority"]),
)
@settings(max_examples=150, deadline=None)
def test_the_next_plan_is_the_same_without_those_that_are_left_for_later(
    before: list[tuple[int, int, str | None]],
    rows: list[tuple[int, int, str | None]],
    num_steps: int,
    max_num_seqs: int,
    budget: int,
    policy: str,
) -> None:
    config = SchedulerConfig(
        max_num_batched_tokens=budget, max_num_seqs=max_num_seqs, max_model_len=64, policy=policy
    )
    plans = []
    for is_everything in (True, False):
        scheduler = Scheduler(config, pool_of(48))
        for request in requests_of(before, "before", 2000):
            scheduler.add(request, 0.0)
        for _ in range(num_steps):
            plan = scheduler.plan(0.0)
            if plan is not None:
                ends = [chunk.start + chunk.n_new == len(chunk.seq.tokens) for chunk in plan.chunks]
                scheduler.commit(plan, StepResult(tuple((1,) if end else () for end in ends)))
        requests = requests_of(rows, "new")
        count = len(requests) if is_everything else scheduler.num_to_begin(requests)
        for request in requests[:count]:
            scheduler.add(request, 0.0)
        plans.append(content(scheduler.plan(0.0)))
        for request in requests[count:]:
            scheduler.add(request, 0.0)
        scheduler.check()
    assert plans[0] == plans[1]


def scheduler_of(**settings: Any) -> Scheduler:
    return Scheduler(SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=8, **settings), pool_of(64))


def test_a_steps_tokens_or_all_slots_are_enough_and_the_adapters_of_a_few_more() -> None:
    long, short = requests_of([(30, 1, None)] * 40, "long"), requests_of([(1, 1, None)] * 40, "short")
    assert scheduler_of().num_to_begin(long) == 3 + PREFETCH_DEPTH
    assert scheduler_of().num_to_begin(short) == 8 + PREFETCH_DEPTH
    assert scheduler_of().num_to_begin(long[:3]) == 3
    assert scheduler_of().num_to_begin([]) == 0


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_only_an_order_of_arrival_leaves_anything_for_later(policy: str) -> None:
    requests = requests_of([(30, 1, None)] * 40, "r")
    expected = 3 + PREFETCH_DEPTH if policy in ("fcfs", "priority") else 40
    assert scheduler_of(policy=policy).num_to_begin(requests) == expected


def test_nothing_is_left_for_later_where_it_might_go_first_or_be_refused() -> None:
    requests = requests_of([(30, 1, None)] * 40, "r")
    assert scheduler_of(adapter_cluster=2).num_to_begin(requests) == 40
    assert scheduler_of(service=ServiceLevels(ttft_s=1.0, refuse_late=True)).num_to_begin(requests) == 40
    urgent = request_of("urgent", [1], priority=-1)
    assert scheduler_of(policy="priority").num_to_begin([*requests, urgent]) == 41
    mixed = request_of("mixed", [1], adapter=AdapterRef("m", "m", 0, (("a", 0.5), ("b", 0.5))))
    assert scheduler_of().num_to_begin([*requests, mixed]) == 41


@pytest.mark.parametrize("length", [1, 63, 64, 200, 399, 400])
def test_a_request_is_refused_by_the_check_iff_it_is_when_added(length: int) -> None:
    scheduler = Scheduler(SchedulerConfig(max_model_len=400), pool_of(16))
    request = request_of("r", length, 2)
    if length <= 63:
        scheduler.check_request(request)
        scheduler.add(request, 0.0)
        return
    with pytest.raises(RequestError) as checked:
        scheduler.check_request(request)
    with pytest.raises(RequestError) as added:
        scheduler.add(request, 0.0)
    assert str(checked.value) == str(added.value)
    assert not scheduler.has_work
