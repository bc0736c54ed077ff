"""Reports: definitions of the metrics, worked out by hand, and the capacity search."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rich.console import Console
from simulate_helpers import BASE_S, TOKEN_S, machine_of, request_of, trace_of

from polybatch.errors import ConfigError
from polybatch.request import Deadlines, WorkflowStage
from polybatch.simulate.capacity import keeps_attainment, keeps_pace, search_capacity
from polybatch.simulate.cluster import simulate
from polybatch.simulate.report import Percentiles, between_tokens, parse_slo, report
from polybatch.simulate.tables import times_table, totals_table

PREFILL_S, DECODE_S = BASE_S + 32 * TOKEN_S, BASE_S + TOKEN_S


def test_times_of_one_request_are_those_of_its_tokens() -> None:
    found = report(simulate(trace_of(request_of(0, at=2.0)), machine_of()))
    assert found.ttft.p50 == pytest.approx(PREFILL_S)
    assert found.tpot.mean == found.tbt.max == pytest.approx(DECODE_S)
    assert found.e2e.p99 == found.wall_s == pytest.approx(PREFILL_S + 3 * DECODE_S)
    assert found.scheduling_delay.max == 0
    assert found.throughput == pytest.approx(1 / found.wall_s)
    assert found.busy_share == pytest.approx(1)
    assert (found.attainment, found.goodput) == (None, None)


def test_time_between_tokens_includes_preemptions() -> None:
    trace = trace_of(request_of(0, 0.0, 120, 60), request_of(1, 0.0, 120, 60))
    run = simulate(trace, machine_of(num_pages=18))
    assert run.replicas[0].scheduler.stats().num_preemptions > 0
    assert between_tokens(run.outcomes).max() > 10 * DECODE_S
    assert report(run).num_preemptions > 0


def test_attainment_counts_every_request_and_goodput_only_those_in_time() -> None:
    trace = trace_of(request_of(0), request_of(1, 10.0), request_of(2, 10.0, 16 * 2000))
    run = simulate(trace, machine_of())
    good = report(run, Deadlines(ttft_s=1.0))
    assert (good.num_completed, good.num_refused) == (2, 1)
    assert good.attainment == pytest.approx(2 / 3)
    assert good.goodput == pytest.approx(2 / good.wall_s)
    assert report(run, Deadlines(ttft_s=0.001)).attainment == 0


def test_a_request_is_held_to_its_own_deadlines_unless_the_run_sets_that_limit() -> None:
    trace = trace_of(request_of(0, deadlines=Deadlines(ttft_s=0.001)))
    run = simulate(trace, machine_of())
    assert report(run).attainment == 0
    assert report(run, Deadlines(ttft_s=1.0)).attainment == 1
    assert report(run, Deadlines(tpot_s=1.0)).attainment == 0


def test_a_workflow_is_in_time_when_its_last_call_is() -> None:
    def stage(name: str, due_s: float) -> WorkflowStage:
        return WorkflowStage(name, "call", due_s)

    trace = trace_of(
        request_of(0, workflow=stage("quick", 5.0)),
        request_of(1, workflow=stage("quick", 5.0), after=("r0",)),
        request_of(2, workflow=stage("late", 0.06)),
        request_of(3, workflow=stage("late", 0.06), after=("r2",)),
    )
    assert report(simulate(trace, machine_of())).workflow_attainment == 0.5


def test_satisfaction_falls_with_the_square_of_the_wait() -> None:
    run = simulate(trace_of(request_of(0)), machine_of())
    assert report(run, Deadlines(ttft_s=2 * PREFILL_S)).satisfaction == pytest.approx(0.75)


def test_percentiles_are_those_of_numpy_and_none_of_nothing() -> None:
    values = list(np.random.RandomState(0).random_sample(101))
    found = Percentiles.of(values)
    assert (found.p50, found.p99) == (np.percentile(values, 50), np.percentile(values, 99))
    assert Percentiles.of([]) == Percentiles()


def test_a_report_is_json_and_a_table() -> None:
    found = report(simulate(trace_of(request_of(0)), machine_of()), Deadlines(ttft_s=1))
    assert json.loads(json.dumps(found.as_json()))["ttft"]["p50"] == found.ttft.p50
    console = Console(record=True, width=120)
    console.print(times_table(found), totals_table([("fcfs", found)]))
    text = console.export_text()
    assert "42.0 ms" in text
    assert "100.0%" in text


@pytest.mark.parametrize("text", ["ttft", "ttft=x", "first=1", "ttft=-1", "ttft=0.3;tpot=1"])
def test_a_malformed_slo_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"slo is .*ttft=0.3,tpot=0.05"):
        parse_slo(text)


def test_an_slo_is_read_in_seconds() -> None:
    assert parse_slo("ttft=0.3, tpot=0.05,e2e=10") == Deadlines(ttft_s=0.3, tpot_s=0.05, e2e_s=10)


def test_capacity_is_found_to_the_granularity() -> None:
    base = trace_of(*(request_of(i, 0.1 * i) for i in range(200)))

    def trial(rate: float):  # type: ignore[no-untyped-def]
        return report(simulate(base.at_rate(rate), machine_of()), Deadlines(ttft_s=0.2))

    found = search_capacity(trial, keeps_attainment(0.9), start_rate=1.0)
    good, bad = (max(r for r, ok in found.trials if ok), min(r for r, ok in found.trials if not ok))
    assert found.rate == good < bad <= good * 1.025
    assert found.report is not None
    assert found.report.attainment >= 0.9


def test_capacity_is_zero_where_nothing_is_good_and_the_search_ends() -> None:
    run = report(simulate(trace_of(request_of(0)), machine_of()))
    found = search_capacity(lambda _: run, lambda _: False, start_rate=1.0)
    assert (found.rate, found.report, len(found.trials)) == (0.0, None, 20)


def test_pace_means_tokens_in_time_and_a_short_queue_with_no_limit_on_the_first_token() -> None:
    found = report(simulate(trace_of(request_of(0, 0.0, 5000)), machine_of()))
    assert found.ttft.p50 is not None
    assert found.ttft.p50 > 2
    assert keeps_pace(0.02)(found)
    assert not keeps_pace(0.01)(found)
