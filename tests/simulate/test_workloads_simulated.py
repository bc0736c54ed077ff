"""Generators: the statistics that their descriptions give, and that they repeat."""

from __future__ import annotations

import numpy as np
import pytest

from polybatch.errors import ConfigError
from polybatch.simulate.workloads import WORKLOADS, make_workload, options_of
from polybatch.simulate.workloads.arrivals import gamma_arrivals
from polybatch.simulate.workloads.hexgen import CALLS, STANDARD, remaining, stages
from polybatch.simulate.workloads.sarathi import DATA_SETS


def gaps(trace):  # type: ignore[no-untyped-def]
    return np.diff([0.0, *(r.arrival_s for r in trace.requests)])


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_a_workload_is_a_function_of_its_seed(name: str) -> None:
    assert make_workload(name, seed=1) == make_workload(name, seed=1)
    assert make_workload(name, seed=1) != make_workload(name, seed=2)


def test_slora_draws_adapters_lengths_and_gaps_from_one_stream_in_this_order() -> None:
    trace = make_workload("slora", rate=2.0, duration_s=50.0, num_adapters=10, alpha=0.6, cv=2.0)
    rng = np.random.RandomState(42)
    indices = (rng.power(0.6, 100) * 10).astype(int)
    inputs, outputs = rng.randint(8, 512, 100), rng.randint(8, 512, 100)
    times = np.cumsum(rng.gamma(0.25, 4 / 2.0, 100))
    assert [r.adapter for r in trace.requests] == [f"adapter-{i}" for i in indices]
    assert [(r.num_input, r.num_output) for r in trace.requests] == list(zip(inputs, outputs, strict=True))
    assert [r.arrival_s for r in trace.requests] == pytest.approx(list(times))


@pytest.mark.parametrize(("alpha", "share"), [(0.1, 0.59), (0.3, 0.20), (0.6, 0.04), (1.0, 0.005)])
def test_slora_alpha_1_is_uniform_and_smaller_is_more_skewed(alpha: float, share: float) -> None:
    trace = make_workload("slora", rate=100.0, duration_s=300.0, alpha=alpha)
    first = sum(r.adapter == "adapter-0" for r in trace.requests) / len(trace)
    assert first == pytest.approx(share, rel=0.15, abs=0.002)
    tenth = {f"adapter-{i}" for i in range(20)}
    assert sum(r.adapter in tenth for r in trace.requests) / len(trace) == pytest.approx(0.1**alpha, rel=0.05)


@pytest.mark.parametrize("cv", [1.0, 4.0, 8.0])
def test_slora_gaps_have_their_mean_and_variation(cv: float) -> None:
    found = np.diff(gamma_arrivals(np.random.RandomState(0), 200_000, 50.0, cv))
    assert found.mean() == pytest.approx(1 / 50, rel=0.06)
    assert found.std() / found.mean() == pytest.approx(cv, rel=0.06)


def test_slora_lengths_are_below_512_and_ranks_go_round() -> None:
    trace = make_workload("slora", rate=100.0, num_adapters=6)
    for lengths in ([r.num_input for r in trace.requests], [r.num_output for r in trace.requests]):
        assert (min(lengths), max(lengths)) == (8, 511)
        assert np.mean(lengths) == pytest.approx(259.5, rel=0.02)
    assert list(trace.adapters.values()) == [64, 32, 16, 8, 64, 32]


@pytest.mark.parametrize("name", sorted(DATA_SETS))
def test_sarathi_lengths_have_the_medians_and_90th_percentiles_of_the_paper(name: str) -> None:
    source = DATA_SETS[name]
    trace = make_workload("sarathi", lengths=name, num_requests=40_000)
    prompts, outputs = ([getattr(r, f) for r in trace.requests] for f in ("num_input", "num_output"))
    assert np.percentile(prompts, (50, 90)) == pytest.approx(source.prompt, rel=0.03)
    # Long prompts leave outputs less room, which lowers these a little.
    assert np.percentile(outputs, (50, 90)) == pytest.approx(source.output, rel=0.06)
    assert max(map(sum, zip(prompts, outputs, strict=True))) <= source.limit
    assert gaps(trace).std() / gaps(trace).mean() == pytest.approx(1, rel=0.05)


def test_sarathi_synthetic_lengths_are_split_20_to_1_and_zipf_falls_with_theta() -> None:
    trace = make_workload("sarathi", lengths="zipf", num_requests=40_000, low=1000, high=1999)
    totals = np.array([r.num_input + r.num_output for r in trace.requests])
    assert all(r.num_output == (r.num_input + r.num_output) // 21 for r in trace.requests)
    assert (totals.min(), totals.max()) == (1000, 1999)
    # P(rank <= k) is about (k / n)^(1 - theta).
    assert np.mean(totals < 1100) == pytest.approx(0.1**0.4, rel=0.1)
    assert gaps(trace).std() / gaps(trace).mean() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    ("task", "prompt", "output"),
    [("chat", 755.5, 200.3), ("code", 171.3, 98.2), ("summarisation", 1738.3, 90.7)],
)
def test_distserve_lengths_have_the_means_of_the_paper(task: str, prompt: float, output: float) -> None:
    trace = make_workload("distserve", task=task, num_requests=40_000)
    assert np.mean([r.num_input for r in trace.requests]) == pytest.approx(prompt, rel=0.01)
    assert np.mean([r.num_output for r in trace.requests]) == pytest.approx(output, rel=0.01)
    assert max(r.num_input + r.num_output for r in trace.requests) <= 2132
    limits = {r.deadlines for r in trace.requests}
    assert [(d.ttft_s, d.tpot_s) for d in limits if d] == [(0.25, 0.1)]


def test_batchllm_has_groups_of_16_with_a_tenfold_prefix_in_no_order() -> None:
    trace = make_workload("batchllm")
    assert len(trace) == 6400
    groups: dict[int, list[int]] = {}
    for at, request in enumerate(trace.requests):
        assert (request.num_input, request.num_output, request.arrival_s) == (2200, 100, 0.0)
        groups.setdefault(request.blocks[0], []).append(at)
    assert {len(places) for places in groups.values()} == {16}
    assert len({r.blocks[1] for r in trace.requests}) == 6400
    assert np.mean([max(places) - min(places) for places in groups.values()]) > 5000


def test_a_standard_hexgen_workflow_has_fifteen_calls() -> None:
    assert len(STANDARD) == 15
    assert remaining([]) == STANDARD
    assert remaining(["ir", "keywords", "ir", "ir", "ir"]) == tuple(
        ["candidates"] * 3 + ["revise"] * 2 + ["unit_tests"] + ["unit_tester"] * 3 + ["evaluate"]
    )
    assert "revise" not in remaining([*STANDARD[:8], "unit_tests"])


def test_hexgen_stages_follow_each_other_and_share_their_templates() -> None:
    trace = make_workload("hexgen", num_questions=400, slo_scale=3.0)
    by_id = {r.request_id: r for r in trace.requests}
    revisions = []
    for number in range(400):
        calls = [r for r in trace.requests if r.workflow and r.workflow.workflow_id == f"hexgen-{number}"]
        names = [r.workflow.stage for r in calls if r.workflow]
        revisions.append(names.count("revise"))
        assert names == [name for stage in stages(revisions[-1]) for name in stage]
        assert len({r.arrival_s for r in calls}) == 1
        assert all(r.workflow and r.workflow.due_s == r.arrival_s + 3.0 * 52.95 for r in calls)
        assert all(
            by_id[before].workflow.workflow_id == f"hexgen-{number}" for r in calls for before in r.after
        )  # type: ignore[union-attr]
        assert [len(r.after) for r in calls if r.workflow and r.workflow.stage == "evaluate"] == [3]
    assert max(revisions) <= 10
    assert np.mean(revisions) == pytest.approx(2, rel=0.15)
    for name, call in CALLS.items():
        of_kind = [r for r in trace.requests if r.workflow and r.workflow.stage == name]
        assert np.mean([r.num_input for r in of_kind]) == pytest.approx(call.prompt, rel=0.04)
        assert {r.block_tokens for r in of_kind} == set(call.templates)
        assert len({r.blocks[0] for r in of_kind}) == len(call.templates)
    own = [block for r in trace.requests for block in r.blocks[1:]]
    assert len(set(own)) == len(own)


def test_a_wrong_workload_or_parameter_is_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"workload is 'slor'.*slora"):
        make_workload("slor")
    with pytest.raises(ConfigError, match=r"no parameter 'alfa'.*alpha"):
        make_workload("slora", alfa=1)
    with pytest.raises(ConfigError, match="num_adapters of workload slora is 'many'"):
        options_of("slora", ["num_adapters=many"])
    with pytest.raises(ConfigError, match="--set is 'ranks'"):
        options_of("slora", ["ranks"])
    assert options_of("slora", ["ranks=8,4", "alpha=0.3"]) == {"ranks": (8, 4), "alpha": 0.3}
