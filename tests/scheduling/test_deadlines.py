"""Deadlines: prefill sized by time, the policy `deadline`, forecasts, workflows, rows in the slack."""

from __future__ import annotations

import random
from dataclasses import replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling_helpers import Driver, adapter_of, pool_of, request_of

from polybatch.config import SchedulerConfig, ServiceLevels
from polybatch.errors import DeadlineError
from polybatch.request import Deadlines, Request, Sequence, SequenceStatus, WorkflowStage
from polybatch.scheduling.adapter_clusters import MAX_PASSED
from polybatch.scheduling.budget import FEW_TOKENS, MARGIN, MIN_PREFILL_TOKENS
from polybatch.scheduling.costs import CostModel, StepCosts, StepShape, shape_of
from polybatch.scheduling.deadlines import Attainment, attainment_of, due_of
from polybatch.scheduling.online_cost import MIN_FITTED, OnlineCost
from polybatch.scheduling.plan import StepPlan
from polybatch.scheduling.policies import BATCH_PRIORITY
from polybatch.scheduling.workflow import StageTimes

COSTS = CostModel(base=0.01, per_token=0.0005, per_context=1e-6)


def driver_of(costs: StepCosts | None = COSTS, pages: int = 400, **config: object) -> Driver:
    settings = {"max_num_batched_tokens": 512, "max_model_len": 2048, "enable_prefix_caching": False}
    return Driver(SchedulerConfig(**(settings | config)), pool_of(pages, 16), costs=costs)  # type: ignore[arg-type]


def seconds(plan: StepPlan) -> float:
    return COSTS.predict(shape_of(plan, 16))


def decoding(driver: Driver, name: str, max_tokens: int = 60, **promises: object) -> Sequence:
    (seq,) = driver.add(request_of(name, 4, max_tokens, **promises))  # type: ignore[arg-type]
    while seq.num_output == 0:
        driver.step()
    return seq


def late_request(name: str, now: float, prompt: int = 40, ttft_s: float = 1e-3) -> Request:
    return request_of(name, prompt, 3, deadlines=Deadlines(ttft_s=ttft_s), arrival_s=now)


@settings(max_examples=8, deadline=None)
@given(target_s=st.floats(0.03, 0.2), num_decodes=st.integers(1, 4), prompt=st.integers(300, 600))
def test_no_step_beside_live_decodes_takes_longer_than_the_target(
    target_s: float, num_decodes: int, prompt: int
) -> None:
    driver = driver_of(service=ServiceLevels(target_tbt_s=target_s))
    live = [decoding(driver, f"d{i}", 500) for i in range(num_decodes)]
    (long,) = driver.add(request_of("long", prompt, 2))
    while long.num_output == 0:
        driver.step()
        plan = driver.plans[-1]
        assert set(live) <= {chunk.seq for chunk in plan.chunks}
        assert seconds(plan) <= target_s / MARGIN + 1e-9


def test_a_target_that_leaves_no_room_for_a_minimal_chunk_is_kept_with_less_if_less_can_keep_it() -> None:
    sizes = {}
    for target_s in (0.024, 0.012):
        driver = driver_of(service=ServiceLevels(target_tbt_s=target_s))
        decoding(driver, "d", 200)
        driver.add(request_of("long", 700, 2))
        driver.step()
        sizes[target_s] = driver.plans[-1].num_tokens - 1
    assert sizes == {0.024: 2 * FEW_TOKENS, 0.012: MIN_PREFILL_TOKENS}


def test_prefill_is_as_large_as_the_tightest_pace_allows() -> None:
    sizes = {}
    for pace_s in (0.1, 0.2, None):
        driver = driver_of()
        promises = {} if pace_s is None else {"deadlines": Deadlines(tpot_s=pace_s)}
        decoding(driver, "d", 200, **promises)
        driver.add(request_of("long", 700, 2))
        driver.step()
        sizes[pace_s] = driver.plans[-1].num_tokens - 1
    assert MIN_PREFILL_TOKENS < sizes[0.1] < sizes[0.2] < sizes[None] == 511
    assert 0.01 + 0.0005 * sizes[0.1] <= 0.1 / MARGIN


def test_a_token_that_is_late_anyhow_does_not_hold_prefill_at_the_minimum() -> None:
    driver = driver_of()
    seq = decoding(driver, "d", 200, deadlines=Deadlines(tpot_s=0.1))
    driver.now += 5.0
    driver.add(request_of("long", 700, 2))
    driver.step()
    assert driver.plans[-1].num_tokens - 1 > 100
    assert seq.status is SequenceStatus.RUNNING


def test_without_a_cost_model_the_budget_is_fixed() -> None:
    driver = driver_of(costs=None, service=ServiceLevels(target_tbt_s=0.001))
    decoding(driver, "d", 200)
    driver.add(request_of("long", 700, 2))
    driver.step()
    assert driver.plans[-1].num_tokens == 512


def test_the_most_urgent_goes_first_and_what_can_no_longer_be_met_last() -> None:
    driver = driver_of(policy="deadline", max_num_seqs=1)
    decoding(driver, "busy", 40)
    now = driver.now
    driver.add(late_request("hopeless", now))
    for name, ttft_s in (("calm", 9.0), ("urgent", 1.5), ("soon", 4.0)):
        driver.add(late_request(name, now, ttft_s=ttft_s))
    order = []
    while driver.scheduler.has_work:
        order += [seq.request.request_id for seq in driver.step()]
    assert order == ["busy", "urgent", "soon", "calm", "hopeless"]


def test_of_two_equally_urgent_the_shorter_prompt_goes_first() -> None:
    driver = driver_of(policy="deadline", max_num_seqs=1)
    decoding(driver, "busy", 5)
    driver.add(late_request("long", driver.now, 900, ttft_s=8.0))
    driver.add(late_request("short", driver.now + 1e-6, 10, ttft_s=8.0))
    order = []
    while driver.scheduler.has_work:
        order += [seq.request.request_id for seq in driver.step()]
    assert order == ["busy", "short", "long"]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), has_costs=st.booleans())
def test_the_relegated_run_in_the_end_though_there_is_always_something_to_meet(
    seed: int, has_costs: bool
) -> None:
    rng = random.Random(seed)
    driver = driver_of(COSTS if has_costs else None, policy="deadline", max_num_seqs=rng.choice([1, 3]))
    relegated = [driver.add(late_request(f"late{i}", 0.5, rng.randint(5, 60)))[0] for i in range(3)]
    driver.now += 1.0
    number = 0
    for _ in range(600):
        while len(driver.live) < 8:
            driver.add(late_request(f"r{number}", driver.now, rng.randint(5, 60), ttft_s=1e6))
            number += 1
        driver.step()
        if all(seq.status is SequenceStatus.FINISHED for seq in relegated):
            break
    assert all(seq.status is SequenceStatus.FINISHED for seq in relegated)


def test_late_requests_are_given_up_only_where_that_is_asked_for() -> None:
    for abort_late in (False, True):
        driver = driver_of(policy="deadline", max_num_seqs=1, service=ServiceLevels(abort_late=abort_late))
        decoding(driver, "busy", 30)
        driver.add(late_request("late", driver.now, ttft_s=0.1))
        driver.add(late_request("fine", driver.now, ttft_s=100.0))
        driver.run()
        assert driver.given_up == (["late"] if abort_late else [])


def test_what_a_given_up_request_is_told_names_deadline_and_wait() -> None:
    driver = driver_of(policy="deadline", max_num_seqs=1, service=ServiceLevels(abort_late=True))
    decoding(driver, "busy", 30)
    driver.add(late_request("late", driver.now, ttft_s=0.1))
    driver.now += 0.2
    ((request_id, told),) = driver.scheduler.to_abort(driver.now)
    assert request_id == "late"
    assert "due 0.1 s after arrival" in told
    assert "0.2 s of waiting" in told


def test_an_answer_says_what_then_comes_true() -> None:
    driver = driver_of(max_num_seqs=4)
    for i in range(6):
        driver.add(request_of(f"r{i}", [i] * 200, 30))
    driver.step()
    now = driver.now
    (seq,) = driver.add(
        request_of("asked", [9] * 100, 20, deadlines=Deadlines(ttft_s=0.2, e2e_s=60.0), arrival_s=now)
    )
    answer = driver.scheduler.answer("asked")
    assert answer is not None
    assert answer.missed == ("ttft",)
    assert not answer.is_met
    while seq.num_output == 0:
        driver.step()
    assert driver.now - now == pytest.approx(answer.ttft_s, rel=0.3)
    driver.run()
    assert driver.now - now == pytest.approx(answer.e2e_s, rel=0.3)


def test_there_is_no_answer_where_nothing_is_promised_or_nothing_predicts() -> None:
    driver = driver_of()
    driver.add(request_of("plain", 4, 2))
    assert driver.scheduler.answer("plain") is None
    assert driver.scheduler.answer("unknown") is None
    blind = driver_of(costs=None)
    blind.add(request_of("asked", 4, 2, deadlines=Deadlines(ttft_s=1.0)))
    assert blind.scheduler.answer("asked") is None


def test_a_refused_request_is_told_deadline_and_forecast_and_leaves_nothing_behind() -> None:
    driver = driver_of(max_num_seqs=1, service=ServiceLevels(refuse_late=True))
    decoding(driver, "busy", 100)
    with pytest.raises(DeadlineError, match=r"ttft of 100 ms would be \d+") as caught:
        driver.add(late_request("late", driver.now, ttft_s=0.1))
    assert caught.value.field == "deadlines"
    assert caught.value.wait_s > 0.1
    assert driver.scheduler.stats().num_waiting == 0
    driver.scheduler.check()
    driver.add(late_request("late", driver.now, ttft_s=100.0))
    driver.run()


def test_a_model_that_has_seen_too_little_answers_nothing_and_refuses_nobody() -> None:
    costs = OnlineCost()
    driver = driver_of(costs, max_num_seqs=1, service=ServiceLevels(refuse_late=True))
    decoding(driver, "busy", 100)
    driver.add(late_request("early", driver.now, ttft_s=0.1))
    assert driver.scheduler.answer("early") is None
    for _ in range(MIN_FITTED):
        costs.observe(StepShape(num_tokens=1, num_decodes=1), 0.01)
    with pytest.raises(DeadlineError):
        driver.add(late_request("late", driver.now, ttft_s=0.1))


def test_an_early_first_token_gives_time_to_those_that_follow() -> None:
    request = request_of("r", 4, 10, deadlines=Deadlines(ttft_s=2.0, tpot_s=0.1), arrival_s=1.0)
    due = due_of(request, ServiceLevels(), 1.0)
    assert due is not None
    assert due.next_token_s(1, 1.5) == pytest.approx(3.1)
    assert due.next_token_s(2, 1.6) == pytest.approx(3.2)


def test_an_end_to_end_deadline_says_when_the_first_token_must_be_there() -> None:
    request = request_of("r", 4, 100, deadlines=Deadlines(e2e_s=10.0), arrival_s=1.0, expected_tokens=11)
    due = due_of(request, ServiceLevels(), 1.0)
    assert due is not None
    assert due.first_s == inf
    assert due.first_token_s(0.5) == pytest.approx(11.0 - 5.0)


def test_classes_have_deadlines_of_their_own_and_a_request_those_it_brings() -> None:
    levels = ServiceLevels(ttft_s=6.0, batch_e2e_s=600.0)
    live, row = request_of("r", 4, arrival_s=1.0), request_of("b", 4, priority=BATCH_PRIORITY, arrival_s=1.0)
    own = request_of("o", 4, deadlines=Deadlines(tpot_s=0.1), arrival_s=1.0)
    dues = [due_of(request, levels, 1.0) for request in (live, row, own)]
    assert [(due.first_s, due.pace_s, due.last_s) for due in dues if due is not None] == [
        (7.0, inf, inf), (inf, inf, 601.0), (inf, 0.1, inf),
    ]  # fmt: skip
    assert due_of(live, ServiceLevels(), 1.0) is None


def test_attainment_is_of_what_was_promised_and_nothing_for_what_failed() -> None:
    deadlines = Deadlines(ttft_s=1.0, tpot_s=0.1)
    assert attainment_of(deadlines, 0.0, 0.9, 1.9, 11) == Attainment(ttft=True, tpot=True)
    assert attainment_of(deadlines, 0.0, 1.1, 2.0, 11) == Attainment(ttft=False, tpot=True)
    assert not attainment_of(deadlines, 0.0, 0.9, 1.0, 11, has_ended_well=False).is_met
    assert attainment_of(Deadlines(e2e_s=1.0), 0.0, None, None, 0) == Attainment(e2e=False)


def test_a_stage_gets_its_share_of_the_time_left() -> None:
    times = StageTimes()
    times.observe("draft", 3.0)
    times.observe("check", 1.0)
    assert times.budget_s("draft", ("check", "check"), 10.0, 3.0) == pytest.approx(6.0)
    assert times.budget_s("last", (), 10.0, 3.0) == pytest.approx(10.0)
    assert times.mean_s("unknown", 7.0) == 7.0


def test_given_times_of_stages_stay_as_they_are() -> None:
    times = StageTimes([("draft", 3.0)])
    times.observe("draft", 100.0)
    times.observe("check", 1.0)
    assert times.budget_s("draft", ("check",), 8.0, 3.0) == pytest.approx(6.0)


def test_the_stage_that_may_wait_least_goes_first() -> None:
    driver = driver_of(policy="deadline", max_num_seqs=1)
    decoding(driver, "busy", 5)
    for name, due_s, remaining in (("calm", 60.0, ()), ("chain", 60.0, ("x",) * 9), ("near", 20.0, ())):
        stage = WorkflowStage(name, "x", driver.now + due_s, remaining)
        driver.add(request_of(name, 20, 4, workflow=stage, arrival_s=driver.now))
    order = []
    while driver.scheduler.has_work:
        order += [seq.request.request_id for seq in driver.step()]
    assert order == ["busy", "chain", "near", "calm"]


def rows_of(driver: Driver, count: int) -> list[Sequence]:
    return [
        driver.add(request_of(f"row{i}", [i + 1] * 100, 200, priority=BATCH_PRIORITY))[0]
        for i in range(count)
    ]


@settings(max_examples=10, deadline=None)
@given(slowdown=st.sampled_from([0.0, 0.05, 0.3]), count=st.integers(1, 30))
def test_rows_lengthen_steps_of_live_requests_by_no_more_than_their_share(
    slowdown: float, count: int
) -> None:
    driver = driver_of(service=ServiceLevels(batch_slowdown=slowdown))
    rows_of(driver, count)
    for _ in range(5):
        driver.step()
    live = decoding(driver, "live", 40)
    (long,) = driver.add(request_of("long", [7] * 700, 5))
    while live.status is not SequenceStatus.FINISHED:
        driver.step()
        plan = driver.plans[-1]
        mine = [chunk for chunk in plan.chunks if chunk.seq.request.priority < BATCH_PRIORITY]
        alone = replace(plan, chunks=tuple(mine), loads=())
        assert seconds(plan) <= seconds(alone) * (1 + slowdown) + 1e-9
        assert long.num_preemptions == 0
    driver.run()


def test_rows_alone_run_in_short_steps_where_live_requests_may_come_and_all_of_them_finish() -> None:
    driver = driver_of(service=ServiceLevels(max_batch_step_s=0.05))
    rows = rows_of(driver, 20)
    driver.run()
    assert all(row.num_output == 200 for row in rows)
    longest = max(map(seconds, driver.plans))
    assert 0.04 < longest <= 0.05 + COSTS.per_token * MIN_PREFILL_TOKENS


def test_those_who_share_an_adapter_go_first_and_nobody_is_passed_over_for_ever() -> None:
    adapters = [adapter_of("a"), adapter_of("b")]
    counts = {}
    for cluster in (None, 1):
        driver = driver_of(costs=None, max_num_seqs=4, adapter_cluster=cluster)
        for i in range(200):
            driver.add(request_of(f"r{i}", [i] * 4, 3, adapter=adapters[i % 2]))
        waits = []
        order: list[str] = []
        while driver.scheduler.has_work:
            order += [seq.request.request_id for seq in driver.step()]
            waits.append(len(driver.plans[-1].resident))
        counts[cluster] = sum(waits)
        position = {name: at for at, name in enumerate(order)}
        assert max(position[f"r{i}"] - i for i in range(200)) <= MAX_PASSED + 8
    assert counts[1] < 0.75 * counts[None]
