"""Several engines: routers, unlike machines, and prefill apart from decoding."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate_helpers import BASE_S, SETTINGS, TOKEN_S, check, machine_of, request_of, trace_of

from polybatch.errors import ConfigError
from polybatch.scheduling.costs import CostModel
from polybatch.simulate.cluster import simulate
from polybatch.simulate.routers import ROUTERS, router_named

SLOW = CostModel(base=10 * BASE_S, per_token=10 * TOKEN_S)


def placed(trace, machines, router):  # type: ignore[no-untyped-def]
    run = simulate(trace, machines, SETTINGS, router=router)
    check(run)
    return [outcome.replica for outcome in run.outcomes]


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_every_router_brings_every_request_to_its_end(router: str) -> None:
    trace = trace_of(
        *(request_of(i, 0.01 * i, 40, 10, adapter="ab"[i % 2], blocks=(i % 3,)) for i in range(60)),
        adapters={"a": 8, "b": 8},
    )
    assert set(placed(trace, [machine_of()] * 3, router)) <= {0, 1, 2}


def test_round_robin_takes_each_in_turn() -> None:
    trace = trace_of(*(request_of(i, 0.1 * i) for i in range(6)))
    assert placed(trace, [machine_of()] * 3, "round-robin") == [0, 1, 2, 0, 1, 2]


def test_least_work_avoids_the_engine_that_has_a_long_request() -> None:
    long = request_of(0, 0.0, 400, 100, expected_tokens=100)
    trace = trace_of(long, *(request_of(i, 0.001 * i, expected_tokens=4) for i in range(1, 5)))
    assert placed(trace, [machine_of()] * 2, "least-work") == [0, 1, 1, 1, 1]


def test_prefix_affinity_sends_equal_beginnings_to_one_engine() -> None:
    trace = trace_of(
        *(request_of(i, 0.5 * i, 512, 2, blocks=(i % 2, 10 + i), block_tokens=256) for i in range(12))
    )
    where = placed(trace, [machine_of()] * 2, "prefix-affinity")
    assert len({w for i, w in enumerate(where) if i % 2}) == 1
    run = simulate(trace, [machine_of()] * 2, SETTINGS, router="prefix-affinity")
    assert sum(o.num_cached for o in run.outcomes) == 10 * 256


def test_adapter_affinity_keeps_an_adapter_in_one_place() -> None:
    names = [f"a{i}" for i in range(6)]
    trace = trace_of(
        *(request_of(i, 0.4 * i, adapter=names[i % 6]) for i in range(36)), adapters=dict.fromkeys(names, 8)
    )
    run = simulate(trace, [machine_of()] * 3, SETTINGS, router="adapter-affinity")
    assert sum(r.scheduler.stats().num_adapter_loads for r in run.replicas) == 6


def test_affinity_gives_way_where_all_want_the_same_engine() -> None:
    trace = trace_of(*(request_of(i, 0.0, 256, 50, blocks=(7,)) for i in range(40)))
    assert set(placed(trace, [machine_of()] * 2, "prefix-affinity")) == {0, 1}


def test_hexgen_uses_the_fast_machine_first_and_the_slow_one_when_work_piles_up() -> None:
    machines = [machine_of(), machine_of(name="slow", costs=SLOW)]
    few = trace_of(*(request_of(i, 10.0 * i) for i in range(5)))
    assert set(placed(few, machines, "hexgen")) == {0}
    many = trace_of(*(request_of(i, 0.0, 100, 20) for i in range(60)))
    where = placed(many, machines, "hexgen")
    assert 0 < where.count(1) < where.count(0)


def test_outstanding_work_is_given_back_when_requests_end() -> None:
    from polybatch.simulate.cluster import Cluster
    from polybatch.simulate.engine import Replica

    replicas = [Replica(machine_of(), SETTINGS, {}, i) for i in range(2)]
    cluster = Cluster(trace_of(*(request_of(i) for i in range(20))), replicas, [], "least-work")
    cluster.run()
    assert cluster.route.work == pytest.approx([0.0, 0.0])  # type: ignore[attr-defined]


def test_an_unknown_router_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"router is 'nearest'.*round-robin"):
        router_named("nearest", [])


def test_disaggregated_times_are_prefill_transfer_and_decode_steps() -> None:
    kv_bytes = 32 * 1024 * 2 / 16
    machine = machine_of(link_bytes_per_s=kv_bytes / 0.05)
    run = simulate(trace_of(request_of(0, 1.0, 32, 4)), [machine] * 2, SETTINGS, num_prefill=1)
    check(run)
    (outcome,) = run.outcomes
    decode = BASE_S + TOKEN_S
    assert outcome.ttft_s == pytest.approx(BASE_S + 32 * TOKEN_S)
    assert outcome.token_times[1] - outcome.token_times[0] == pytest.approx(0.05 + decode)
    assert outcome.token_times[3] - outcome.token_times[1] == pytest.approx(2 * decode)
    assert outcome.replica == 1


def test_an_output_of_one_token_needs_no_transfer() -> None:
    run = simulate(trace_of(request_of(0, num_output=1)), [machine_of()] * 2, SETTINGS, num_prefill=1)
    check(run)
    assert run.outcomes[0].replica == 0
    assert run.replicas[1].num_steps == 0


def test_decoding_apart_is_not_disturbed_by_prompts() -> None:
    talk = request_of(0, 0.0, 16, 60)
    prompts = [request_of(i, 0.05 * i, 500, 1) for i in range(1, 10)]
    together = simulate(trace_of(talk, *prompts), machine_of()).outcomes[0]
    apart = simulate(trace_of(talk, *prompts), [machine_of()] * 2, SETTINGS, num_prefill=1).outcomes[0]

    def worst(times: list[float]) -> float:
        return max(b - a for a, b in pairwise(times[1:]))

    assert worst(apart.token_times) == pytest.approx(BASE_S + TOKEN_S)
    assert worst(together.token_times) > 0.5


def test_a_full_prefill_engine_waits_until_its_prompts_are_fetched() -> None:
    slow_link = machine_of(num_pages=20, link_bytes_per_s=10 * 16 * 128 / 2.0)
    trace = trace_of(*(request_of(i, 0.0, 160, 3) for i in range(4)))
    run = simulate(trace, [slow_link] * 2, SETTINGS, num_prefill=1)
    check(run)
    starts = sorted(o.first_scheduled_s or 0.0 for o in run.outcomes)
    # Two prompts fill the pool; the third begins when the first has been fetched, two seconds later.
    assert starts[1] < 0.5
    assert starts[2] > 1.9


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 0.4), st.integers(1, 150), st.integers(1, 25)), min_size=1, max_size=20),
    st.integers(12, 40),
    st.integers(1, 2),
)
def test_disaggregated_requests_end_with_all_their_tokens_whatever_the_traffic(
    rows: list[tuple[float, int, int]], num_pages: int, num_prefill: int
) -> None:
    rows.sort()
    trace = trace_of(*(request_of(i, *row) for i, row in enumerate(rows)))
    run = simulate(trace, [machine_of(num_pages)] * 3, SETTINGS, num_prefill=num_prefill)
    check(run)
    assert all(outcome.is_complete for outcome in run.outcomes)


def test_both_phases_need_a_machine() -> None:
    with pytest.raises(ConfigError, match="num_prefill is 2 and there are 2 machines"):
        simulate(trace_of(request_of(0)), [machine_of()] * 2, num_prefill=2)
