"""The planner: what it searches, what it finds, and what it says."""

import math

import pytest

from polybatch.config import PoolSpec
from polybatch.errors import ConfigError
from polybatch.request import Deadlines
from polybatch.scheduling.costs import CostModel
from polybatch.simulate.machines import Machine, scaled
from polybatch.simulate.planner import GRANULARITY, Layout, lasting, layouts, search, verdict
from polybatch.simulate.traces import Trace, TraceRequest

SLO = Deadlines(ttft_s=0.5, tpot_s=0.05)


def machine(base: float = 0.01, per_token: float = 1e-4) -> Machine:
    return Machine(
        name="made-up",
        costs=CostModel(base=base, per_token=per_token),
        pool=PoolSpec(num_pages=4000, page_size=16, page_bytes=1024, num_layers=1),
        adapter_bytes_per_rank=1024.0,
        max_num_seqs=64,
    )


def trace(num: int = 60, gap: float = 0.25) -> Trace:
    rows = (
        TraceRequest(request_id=str(i), arrival_s=i * gap, num_input=200, num_output=20) for i in range(num)
    )
    return Trace("even", tuple(rows))


def test_a_rate_that_was_found_holds_and_one_a_little_higher_does_not():
    plan = search(trace(), SLO, [Layout(machine=machine())], seconds=1e9, traffic_s=4.0)
    found = plan.best
    assert found is not None
    assert found.report is not None
    assert found.report.attainment is not None
    assert found.report.attainment >= plan.target
    failed = [rate for rate, share in found.curve if share < plan.target]
    assert min(failed) <= (1 + GRANULARITY) * found.rate
    assert all(rate > found.rate for rate in failed)


def test_a_faster_machine_keeps_up_more_and_is_the_best():
    slow, fast = Layout(machine=machine(per_token=4e-4)), Layout(machine=machine(per_token=1e-4))
    plan = search(trace(), SLO, [slow, fast], seconds=1e9, traffic_s=4.0)
    assert plan.best is not None
    assert plan.best.layout is fast


def test_what_cannot_beat_the_best_is_given_up_after_one_trial_and_reported_as_a_bound():
    slow, fast = Layout(machine=machine(per_token=4e-4)), Layout(machine=machine(per_token=1e-4))
    plan = search(trace(), SLO, [fast, slow], seconds=1e9, traffic_s=4.0)
    loser = plan.candidates[1]
    assert loser.is_bound
    assert len(loser.curve) == 1
    assert plan.best is not None
    assert plan.best.layout is fast
    assert loser.num_groups(1.0) is None


def test_colocated_layouts_come_first_and_are_always_compared_with_separate_phases():
    tried = layouts([machine()], 2, chunks=(256, 1024))
    assert [layout.num_prefill for layout in tried] == [0, 0, 1]
    plan = search(trace(), SLO, tried, seconds=1e9, traffic_s=4.0)
    assert plan.baseline is not None
    assert plan.disaggregated is not None
    assert any("Phases apart" in sentence for sentence in verdict(plan))


def test_groups_that_repeat_a_smaller_split_are_not_tried_again():
    splits = [(each.num_prefill, each.num_engines) for each in layouts([machine()], 4, chunks=(512,))]
    assert splits == [(0, 1), (1, 2), (1, 3), (2, 3), (1, 4), (3, 4)]


def test_machines_with_more_devices_than_allowed_are_left_out_and_none_at_all_is_refused():
    wide = scaled(machine(), num_devices=2)
    assert all(each.machine.num_devices == 1 for each in layouts([machine(), wide], 1))
    with pytest.raises(ConfigError, match="max_devices is 1"):
        layouts([wide], 1)


def test_the_first_layout_is_searched_even_without_time_and_the_others_are_named():
    tried = layouts([machine()], 1, chunks=(256, 512, 1024))
    ticks = iter(range(0, 1000, 10))
    plan = search(trace(), SLO, tried, seconds=5.0, traffic_s=4.0, clock=lambda: float(next(ticks)))
    assert len(plan.candidates) == 1
    assert plan.untried == tuple(tried[1:])
    assert any("not tried" in sentence for sentence in verdict(plan))


@pytest.mark.parametrize(("rate", "answer"), [(1.0, "Yes"), (500.0, "No")])
def test_the_question_is_answered_by_the_asked_rate_itself(rate: float, answer: str):
    plan = search(trace(), SLO, [Layout(machine=machine())], rate=rate, seconds=1e9, traffic_s=4.0)
    assert next(iter(verdict(plan))).startswith(answer)


def test_the_run_that_answers_the_question_is_the_search_s_first():
    plan = search(trace(), SLO, [Layout(machine=machine())], rate=2.0, seconds=1e9, traffic_s=4.0)
    assert plan.num_trials == len(plan.candidates[0].curve)


def test_enough_groups_serve_the_rate_and_one_fewer_does_not():
    plan = search(trace(), SLO, [Layout(machine=machine())], rate=100.0, seconds=1e9, traffic_s=4.0)
    assert plan.best is not None
    groups = plan.best.num_groups(100.0)
    assert groups is not None
    assert (groups - 1) * plan.best.rate < 100.0 <= groups * plan.best.rate


def test_limits_that_no_rate_can_meet_leave_no_best_layout():
    plan = search(trace(4), Deadlines(ttft_s=1e-4), [Layout(machine=machine())], seconds=1e9, traffic_s=4.0)
    assert plan.best is None
    assert any("No layout" in sentence for sentence in verdict(plan))


@pytest.mark.parametrize(("rate", "seconds"), [(1.0, 10.0), (7.0, 30.0), (0.01, 1.0)])
def test_traffic_lasts_as_long_as_asked_at_the_asked_rate(rate: float, seconds: float):
    made = lasting(trace(), rate, seconds)
    assert len(made) == max(1, round(rate * seconds))
    if len(made) > 10:
        assert math.isclose(made.rate, rate, rel_tol=0.15)


def test_repetitions_of_a_trace_share_no_prefixes_with_each_other():
    once = Trace(
        "shared",
        tuple(
            TraceRequest(
                request_id=str(i), arrival_s=float(i), num_input=512, num_output=2, blocks=(i % 2,),
            )
            for i in range(4)
        ),
    )  # fmt: skip
    made = lasting(once, 1.0, 12.0)
    by_turn = [{block for r in made.requests[i : i + 4] for block in r.blocks} for i in (0, 4, 8)]
    assert [len(blocks) for blocks in by_turn] == [2, 2, 2]
    assert not by_turn[0] & by_turn[1]
    assert not by_turn[1] & by_turn[2]


def test_a_search_without_limits_or_with_an_impossible_share_is_refused():
    with pytest.raises(ConfigError, match="slo is empty"):
        search(trace(), Deadlines(), [Layout(machine=machine())])
    with pytest.raises(ConfigError, match=r"target is 1\.5"):
        search(trace(), SLO, [Layout(machine=machine())], target=1.5)
