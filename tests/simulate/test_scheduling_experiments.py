"""Experiments of benchmarks/scheduling that are small enough to be held by every test run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.scheduling import groups, hexgen, sarathi, sarathi_capacity
from polybatch.scheduling.costs import StepShape
from polybatch.simulate.cluster import simulate
from polybatch.simulate.engine import EngineSettings
from polybatch.simulate.machines import h100_8b
from polybatch.simulate.report import report
from polybatch.simulate.workloads.batchllm import batchllm
from polybatch.simulate.workloads.sarathi import sarathi as sarathi_trace


def test_long_prompts_stretch_times_between_tokens_by_at_most_half() -> None:
    found = sarathi.long_prompts(h100_8b())
    assert found["holds"], found["rows"]
    assert found["rows"][1]["ratio"] > 5


def test_the_token_budget_is_the_largest_whose_step_stays_within_the_limit() -> None:
    machine = h100_8b()
    limit_s = 5 * machine.decode_s(32, 4096)
    budget = sarathi.token_budget(machine, limit_s)
    assert budget % sarathi.TILE == 0

    def step_s(num_tokens: int) -> float:
        return machine.costs.predict(
            StepShape(
                num_tokens=num_tokens + 32,
                num_decodes=32,
                num_prefill_tokens=num_tokens,
                decode_context=32 * 4096,
                prefill_pairs=num_tokens * 8192,
                num_logits=33,
                num_prefills=1,
                prefill_context=8192,
            )
        )

    assert step_s(budget) <= limit_s < step_s(budget + sarathi.TILE)


def test_groups_use_all_the_sharing_that_an_lru_cache_loses() -> None:
    machine = h100_8b()
    few_pages = replace(machine, pool=replace(machine.pool, num_pages=1200))
    trace = batchllm(num_requests=320, output_tokens=20)
    rows = groups.shared_prefixes(few_pages, trace)["rows"]
    assert rows[2]["saved_of_optimum"] >= 0.97 > rows[1]["saved_of_optimum"]
    assert rows[2]["time_s"] < rows[1]["time_s"] < rows[0]["time_s"]


def test_a_slow_machine_takes_its_factor_longer_for_everything() -> None:
    machine = h100_8b()
    slow = hexgen.slow(machine, 3.0)
    assert abs(slow.request_s(5000, 100) / machine.request_s(5000, 100) - 3) < 1e-9


@pytest.mark.parametrize("budget", [512, 16_384])
def test_nothing_runs_faster_than_the_ideal(budget: int) -> None:
    machine = h100_8b()
    trace = sarathi_trace(num_requests=150, seed=3)
    at_once = trace.with_requests(replace(r, arrival_s=0.0) for r in trace.requests)
    settings = EngineSettings(max_num_batched_tokens=budget, enable_prefix_caching=False)
    found = report(simulate(at_once, machine, settings)).throughput
    ideal = sarathi_capacity.ideal_rate(machine, trace, float("inf"))
    assert 0.5 * ideal < found <= ideal


def test_estimates_of_the_papers_machines_have_the_papers_limits() -> None:
    small, large = sarathi_capacity.a100_machines(h100_8b()).values()
    assert 5 * small.decode_s(32, 4096) == pytest.approx(0.1, rel=0.1)
    assert 5 * large.decode_s(32, 4096) == pytest.approx(0.2, rel=0.1)
