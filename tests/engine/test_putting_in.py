"""Putting many prompts in: the device starts with the first of them, and the rest changes nothing."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from engine_helpers import make_core
from helpers import HFWeights, random_tokens, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.config import PoolSpec, SchedulerConfig, ServiceLevels
from polybatch.engine.core import EngineCore
from polybatch.engine.llm import LLM
from polybatch.errors import RequestError
from polybatch.execution.cuda import CudaExecutor
from polybatch.execution.eager import EagerExecutor
from polybatch.execution.fake import FakeAheadExecutor, FakeExecutor, FakeLaunch
from polybatch.request import RequestOutput, SamplingParams
from polybatch.scheduling.composer import PREFETCH_DEPTH
from polybatch.scheduling.policies import POLICIES
from polybatch.scheduling.scheduler import Scheduler

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
BUDGET = 64


class Watched(FakeAheadExecutor):
    """Notes how many requests were in the engine at every launch."""

    llm: LLM

    def launch(self, *args: Any) -> FakeLaunch:
        self.seen = [*getattr(self, "seen", []), self.llm.stats().num_requests]
        return super().launch(*args)


def make_llm(kind: type[FakeExecutor] = Watched, num_pages: int = 256, **settings: Any) -> LLM:
    executor = kind(pool=PoolSpec(num_pages, 4, 32, 1))
    llm = LLM.from_core(make_core(executor=executor, max_num_batched_tokens=BUDGET, **settings))
    executor.llm = llm  # type: ignore[attr-defined]
    return llm


def seen(llm: LLM) -> list[int]:
    found: list[int] = llm.core.executor.seen  # type: ignore[attr-defined]
    return found


def is_idle(llm: LLM) -> bool:
    stats = llm.core.stats()
    return not llm.core.has_work() and stats.scheduler.num_running == stats.scheduler.num_waiting == 0


def prompts_of(count: int, length: int = 20) -> list[list[int]]:
    return [[index] * length for index in range(count)]


def essence(outputs: list[RequestOutput]) -> list[tuple[Any, ...]]:
    return [(o.request_id, o.prompt_token_ids, o.adapter, o.error, o.outputs) for o in outputs]


def test_the_device_starts_with_what_fills_its_first_step_and_has_the_rest_by_the_second() -> None:
    llm = make_llm()
    llm.generate(prompts_of(40), GREEDY)
    assert seen(llm)[:2] == [4 + PREFETCH_DEPTH, 40]  # 4 prompts of 20 tokens for a step of 64


def test_no_more_than_the_slots_are_waited_for() -> None:
    llm = make_llm(max_num_seqs=8)
    llm.generate(prompts_of(40, length=1), GREEDY)
    assert seen(llm)[:2] == [8 + PREFETCH_DEPTH, 40]


@pytest.mark.parametrize("count", [1, 3, 12])
def test_what_fits_the_first_step_is_in_it(count: int) -> None:
    llm = make_llm()
    llm.generate(prompts_of(count), GREEDY)
    assert seen(llm)[0] == count


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_where_the_order_is_not_that_of_arrival_everything_is_in_before_the_first_step(policy: str) -> None:
    llm = make_llm(policy=policy)
    llm.generate(prompts_of(40), GREEDY)
    assert seen(llm)[0] == (4 + PREFETCH_DEPTH if policy in ("fcfs", "priority") else 40)


@pytest.mark.parametrize(
    "settings", [{"service": ServiceLevels(ttft_s=100.0, refuse_late=True)}, {"adapter_cluster": 2}]
)
def test_where_later_requests_matter_to_earlier_ones_everything_is_in_before_the_first_step(
    settings: dict[str, Any],
) -> None:
    llm = make_llm(**settings)
    llm.generate(prompts_of(40), GREEDY)
    assert seen(llm)[0] == 40


def test_mixtures_are_all_made_before_the_first_step() -> None:
    llm = make_llm(adapters=["a", "b"])
    llm.generate(prompts_of(20), GREEDY, [None] * 19 + [[("a", 0.5), ("b", 0.5)]])
    assert seen(llm)[0] == 20


def test_with_several_priorities_the_most_urgent_runs_first_wherever_it_stands() -> None:
    llm = make_llm(policy="priority")
    outputs = llm.generate(prompts_of(40), GREEDY, priority=[1] * 39 + [0])
    assert seen(llm)[0] == 40
    begun = [output.metrics.first_scheduled_s for output in outputs if output.metrics is not None]
    assert min(begun) == begun[39]  # type: ignore[type-var]


def test_prompts_run_in_the_order_given() -> None:
    outputs = make_llm(max_num_seqs=5).generate(prompts_of(40), GREEDY)
    begun = [output.metrics.first_scheduled_s for output in outputs if output.metrics is not None]
    assert begun == sorted(begun)  # type: ignore[type-var]
    assert len(set(begun)) > 3


ROWS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 3), min_size=1, max_size=40),
        st.integers(1, 9),
        st.sampled_from([0.0, 1.0]),
        st.sampled_from([None, "a", "b"]),
        st.integers(1, 2),
    ),
    min_size=1,
    max_size=30,
)


@given(ROWS, st.integers(2, 8), st.sampled_from([24, 200]), st.sampled_from(["fcfs", "priority", "fair"]))
@settings(max_examples=50, deadline=None)
def test_outputs_are_those_of_an_engine_that_has_all_prompts_before_it_starts(
    rows: list[tuple[list[int], int, float, str | None, int]], max_seqs: int, num_pages: int, policy: str
) -> None:
    """The stub's logits hash the whole history of each token out of the pages; seeds are the engine's."""
    found = []
    for kind in (FakeExecutor, Watched):
        llm = make_llm(
            kind, num_pages, policy=policy, max_num_seqs=max_seqs, max_model_len=60, adapters=["a", "b"]
        )
        outputs = llm.generate(
            [row[0] for row in rows],
            [SamplingParams(max_tokens=row[1], temperature=row[2], n=row[4]) for row in rows],
            [row[3] for row in rows],
        )
        found.append(essence(outputs))
        llm.core.scheduler.check()
        assert is_idle(llm)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("bad", "params", "message"),
    [
        ([300], GREEDY, "prompt 30 of 40: prompt has token id 300"),
        ([1.5], GREEDY, "prompt 30 of 40: prompt holds 1.5"),
        ([5] * 60, SamplingParams(max_tokens=100), "prompt 30 of 40: the request needs up to 40 pages"),
    ],
)
def test_a_prompt_that_cannot_run_is_named_before_anything_is_launched(
    bad: list[Any], params: SamplingParams, message: str
) -> None:
    llm = make_llm(num_pages=32)
    prompts = prompts_of(40)
    prompts[30] = bad
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, [params if index == 30 else GREEDY for index in range(40)])
    assert llm.stats().times.num_steps == 0
    assert is_idle(llm)


@pytest.mark.parametrize(
    "failure", [RequestError("no", field="prompt"), KeyboardInterrupt(), ValueError("broken")]
)
@pytest.mark.parametrize("at", [2, 25])
def test_what_breaks_while_prompts_are_put_in_leaves_the_engine_as_it_was(
    failure: BaseException, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [output.outputs for output in make_llm().stream([9, 9], GREEDY)]
    llm, calls = make_llm(), []
    submit = llm.core.submit

    def failing(request: Any, **options: Any) -> None:
        calls.append(request)
        if len(calls) == at + 2:  # the stream's was the first
            raise failure
        submit(request, **options)

    monkeypatch.setattr(llm.core, "submit", failing)
    shown = []
    for output in llm.stream([9, 9], GREEDY):
        shown.append(output.outputs)
        if len(shown) == 2:
            with pytest.raises(type(failure)) as caught:
                llm.generate(prompts_of(40), GREEDY)
            assert not isinstance(failure, RequestError) or f"prompt {at} of 40" in str(caught.value)
            assert llm.core.stats().scheduler.num_running <= 1
            assert gc.isenabled()
    assert shown == alone
    assert is_idle(llm)
    llm.core.scheduler.check()
    expected = make_llm().generate(prompts_of(40), GREEDY)
    assert [o.outputs for o in llm.generate(prompts_of(40), GREEDY)] == [o.outputs for o in expected]


def test_a_stream_gets_all_of_its_steps_while_many_prompts_are_put_in() -> None:
    alone = [output.outputs for output in make_llm().stream([9, 9], GREEDY)]
    llm = make_llm()
    shown = []
    for output in llm.stream([9, 9], GREEDY):
        shown.append(output.outputs)
        if len(shown) == 2:
            many = llm.generate(prompts_of(40), GREEDY)
    assert shown == alone
    assert all(len(output.outputs[0].token_ids) == 6 for output in many)


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_waits_only_while_prompts_are_put_in(
    was_enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, found = make_llm(), []
    launch, submit = llm.core.executor.launch, llm.core.submit  # type: ignore[attr-defined]
    monkeypatch.setattr(
        llm.core, "submit", lambda *args, **kw: (found.append(gc.isenabled()), submit(*args, **kw))
    )
    monkeypatch.setattr(
        llm.core.executor, "launch", lambda *args: (found.append(gc.isenabled()), launch(*args))[1]
    )
    try:
        (gc.enable if was_enabled else gc.disable)()
        llm.generate(prompts_of(40), GREEDY)
        assert gc.isenabled() is was_enabled
        with pytest.raises(RequestError):
            llm.generate([[1], [300]], GREEDY)
        assert gc.isenabled() is was_enabled
    finally:
        gc.enable()
    assert found[:41] == [False] * 41  # the prompts, and the launch among them
    assert set(found[41:]) == {was_enabled}


def test_tokens_of_a_model_are_the_same_on_a_device_that_starts_with_a_part_of_the_prompts() -> None:
    """The CUDA executor, interpreted where there is no GPU, beside one that is given everything first."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limits: dict[str, Any] = {
        "dtype": "float32", "num_pages": 64, "page_size": 16, "max_num_tokens": 64, "max_num_seqs": 16,
        "max_model_len": 64,
    }  # fmt: skip
    weights = HFWeights(tiny_model("llama", num_hidden_layers=1))
    config = SchedulerConfig(max_num_batched_tokens=12, max_num_seqs=16, max_model_len=64)
    prompts = [random_tokens(12 if row == 0 else 1, seed=row) for row in range(10)]
    params = [SamplingParams(max_tokens=2, temperature=row % 2, ignore_eos=True) for row in range(10)]
    found = []
    for executor in (EagerExecutor(weights, **limits), CudaExecutor(weights, **limits, device=device)):
        core = EngineCore(executor, Scheduler(config, executor.pool), max_model_len=64)
        outputs = LLM.from_core(core).generate(prompts, params)
        found.append([output.outputs[0].token_ids for output in outputs])
    assert core.can_work_ahead
    assert found[0] == found[1]
