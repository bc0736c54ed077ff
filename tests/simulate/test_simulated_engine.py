"""One simulated engine: times follow from the cost model, decisions from the scheduler."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate_helpers import BASE_S, SETTINGS, TOKEN_S, check, machine_of, request_of, trace_of

from polybatch.config import PoolSpec
from polybatch.request import Deadlines, FinishReason
from polybatch.scheduling.plan import StepPlan
from polybatch.simulate.cluster import simulate
from polybatch.simulate.engine import EngineSettings, Replica


def test_a_request_alone_takes_its_prefill_and_a_step_per_further_token() -> None:
    run = simulate(trace_of(request_of(0, at=1.0, num_input=32, num_output=4)), machine_of())
    (outcome,) = run.outcomes
    check(run)
    prefill, decode = BASE_S + 32 * TOKEN_S, BASE_S + TOKEN_S
    assert outcome.first_scheduled_s == 1.0
    assert outcome.ttft_s == pytest.approx(prefill)
    assert outcome.tpot_s == pytest.approx(decode)
    assert outcome.e2e_s == pytest.approx(prefill + 3 * decode)
    assert run.num_steps == 4


def test_requests_that_arrive_together_are_batched_together() -> None:
    run = simulate(trace_of(*(request_of(i, at=0.5) for i in range(5))), machine_of())
    assert {outcome.first_scheduled_s for outcome in run.outcomes} == {0.5}
    assert run.num_steps == 4


def test_a_request_that_arrives_during_a_step_waits_for_its_end() -> None:
    run = simulate(trace_of(request_of(0), request_of(1, at=0.001)), machine_of())
    first, second = run.outcomes
    assert second.first_scheduled_s == first.token_times[0]


def test_a_run_repeats_exactly() -> None:
    trace = trace_of(
        *(request_of(i, at=i * 0.013, num_input=10 + 7 * i, num_output=3 + i) for i in range(40))
    )
    times = [[o.token_times for o in simulate(trace, machine_of(40)).outcomes] for _ in range(2)]
    assert times[0] == times[1]


def test_true_lengths_stay_unknown_to_the_scheduler_where_clients_ask_for_more() -> None:
    asked = []

    class Spy(Replica):
        def accept(self, outcome, request, now):  # type: ignore[no-untyped-def]
            asked.append((request.max_tokens, request.expected_tokens))
            return super().accept(outcome, request, now)

    trace = trace_of(request_of(0, num_output=4), request_of(1, num_output=9))
    from polybatch.simulate.cluster import Cluster

    replica = Spy(machine_of(), EngineSettings(max_tokens=100), {})
    run = Cluster(trace, [replica], [], "round-robin").run()
    check(run)
    assert asked == [(100, None), (100, None)]
    assert [len(o.token_times) for o in run.outcomes] == [4, 9]
    assert {o.reason for o in run.outcomes} == {FinishReason.STOP}


def test_equal_blocks_are_computed_once_and_different_ones_are_not() -> None:
    def requests(second: tuple[int, ...]) -> int:
        run = simulate(
            trace_of(
                request_of(0, num_input=100, blocks=(1, 2), block_tokens=64),
                request_of(1, at=10.0, num_input=100, blocks=second, block_tokens=64),
            ),
            machine_of(),
        )
        check(run)
        return run.outcomes[1].num_cached

    assert requests((1, 2)) == 99
    assert requests((1, 3)) == 64
    assert requests((4, 2)) == 0


def test_prompts_without_blocks_share_nothing_nor_do_outputs() -> None:
    run = simulate(
        trace_of(request_of(0, num_input=64, num_output=40), request_of(1, 9.0, 64, 40)), machine_of()
    )
    assert run.outcomes[1].num_cached == 0


def test_a_prompt_that_the_door_refuses_is_an_outcome_with_the_reason() -> None:
    run = simulate(trace_of(request_of(0, num_input=16 * 30), request_of(1)), machine_of(num_pages=20))
    refused, served = run.outcomes
    assert refused.reason is FinishReason.ERROR
    assert refused.error is not None
    assert "pages" in refused.error
    assert served.is_complete


def test_a_client_without_patience_leaves_and_frees_its_place() -> None:
    trace = trace_of(
        request_of(0, num_input=16 * 18, num_output=30), request_of(1, 0.001, 16 * 18, 4, patience_s=0.02),
        request_of(2, 0.002, 16, 4),
    )  # fmt: skip
    run = simulate(trace, machine_of(num_pages=22))
    check(run)
    assert run.outcomes[1].reason is FinishReason.ABORT
    assert run.outcomes[1].finished_s == pytest.approx(0.021)
    assert run.outcomes[2].is_complete


def test_a_request_follows_those_it_comes_after_and_falls_with_them() -> None:
    trace = trace_of(
        request_of(0, num_output=5), request_of(1, num_output=9), request_of(2, after=("r0", "r1")),
        request_of(3, num_input=16 * 2000), request_of(4, after=("r3",)), request_of(5, after=("r4",)),
    )  # fmt: skip
    outcomes = simulate(trace, machine_of()).outcomes
    assert outcomes[2].sent_s == max(o.finished_s or 0.0 for o in outcomes[:2])
    assert [o.reason for o in outcomes[4:]] == [FinishReason.ABORT] * 2
    assert outcomes[5].error is not None


def test_adapters_take_pages_by_their_rank_and_are_loaded_once_while_they_fit() -> None:
    adapters = {"a": 16, "b": 64}
    trace = trace_of(*(request_of(i, 0.1 * i, adapter="ab"[i % 2]) for i in range(10)), adapters=adapters)
    run = simulate(trace, machine_of())
    stats = run.replicas[0].scheduler.stats()
    assert (stats.num_adapter_loads, stats.num_adapter_pages) == (2, 2 + 8)


class Checked(Replica):
    """Checks every plan against the laws of a step."""

    def shape(self, plan: StepPlan):  # type: ignore[no-untyped-def]
        self.scheduler.check()
        prefill = sum(c.n_new for c in plan.chunks if c.n_new > 1 or c.start < c.seq.num_prompt)
        assert prefill <= self.machine.max_num_batched_tokens
        return super().shape(plan)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 0.5), st.integers(1, 200), st.integers(1, 30), st.integers(0, 2)),
        min_size=1, max_size=25,
    ),
    st.integers(20, 60),
)  # fmt: skip
def test_every_request_ends_with_all_its_tokens_whatever_the_traffic(
    rows: list[tuple[float, int, int, int]], num_pages: int
) -> None:
    from polybatch.simulate.cluster import Cluster

    rows.sort()
    trace = trace_of(
        *(
            request_of(i, at, num_input, num_output, adapter=(None, "a", "b")[which])
            for i, (at, num_input, num_output, which) in enumerate(rows)
        ),
        adapters={"a": 16, "b": 32},
    )
    run = Cluster(trace, [Checked(machine_of(num_pages), SETTINGS, trace.adapters)], [], "round-robin").run()
    check(run)
    assert all(outcome.is_complete for outcome in run.outcomes)


def test_page_use_is_thinned_out_and_never_above_the_pool() -> None:
    trace = trace_of(*(request_of(i, 0.0, 40, 200) for i in range(60)))
    run = simulate(trace, machine_of(120), EngineSettings(page_samples=16))
    pages = run.replicas[0].pages
    assert 4 <= len(pages.times) <= 16
    assert pages.times == sorted(pages.times)
    assert all(a + b + c <= 120 for a, b, c in zip(pages.kv, pages.adapters, pages.cached, strict=True))


def test_deadlines_reach_the_scheduler() -> None:
    replica = Replica(machine_of(), SETTINGS, {})
    from polybatch.simulate.engine import Outcome

    deadlines = Deadlines(ttft_s=0.5)
    replica.submit(Outcome(request_of(0, deadlines=deadlines), 0), 0.0)
    (sequence,) = replica.scheduler.live()
    assert sequence.request.deadlines is deadlines


def test_pages_of_unequal_size_do_not_change_what_prompts_share() -> None:
    pool = PoolSpec(num_pages=1000, page_size=48, page_bytes=1024, num_layers=2)
    trace = trace_of(
        request_of(0, num_input=200, blocks=(1, 2, 3, 4), block_tokens=50),
        request_of(1, 5.0, num_input=200, blocks=(1, 2, 3, 9), block_tokens=50),
    )
    assert simulate(trace, machine_of(pool=pool)).outcomes[1].num_cached == 150


def test_requests_that_the_policy_gives_up_are_outcomes_with_what_they_were_told() -> None:
    late = Deadlines(ttft_s=0.6)
    trace = trace_of(
        request_of(0, num_input=400, num_output=40),
        *(request_of(i, 0.01, 400, 40, deadlines=late) for i in range(1, 5)),
    )
    run = simulate(trace, machine_of(num_pages=30), EngineSettings(policy="early_abort"))
    check(run)
    dropped = [o for o in run.outcomes if o.reason is FinishReason.ABORT]
    assert dropped
    assert all(o.error is not None and not o.token_times for o in dropped)


def test_requests_with_deadlines_are_told_at_arrival_whether_they_will_be_met() -> None:
    def told(ttft_s: float) -> bool | None:
        trace = trace_of(request_of(0, num_input=300, deadlines=Deadlines(ttft_s=ttft_s)))
        return simulate(trace, machine_of()).outcomes[0].answer

    assert told(10.0) is True
    assert told(0.01) is False
    assert simulate(trace_of(request_of(0)), machine_of()).outcomes[0].answer is None


def test_batching_is_as_it_was_set() -> None:
    trace = trace_of(request_of(0, 0.0, 16, 40), request_of(1, 0.2, 400, 4))
    apart = simulate(trace, machine_of(), EngineSettings(batching="prefill_first"))
    mixed = simulate(trace, machine_of(), EngineSettings(batching="stall_free", max_num_batched_tokens=64))
    gap_apart, gap_mixed = (
        max(b - a for a, b in pairwise(run.outcomes[0].token_times)) for run in (apart, mixed)
    )
    assert gap_apart > 0.4
    assert gap_mixed < 0.1
