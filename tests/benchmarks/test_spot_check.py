"""Spot checks on the real engine: what is served is what was asked, and runs leave nothing behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scheduling import spot_check
from benchmarks.scheduling.in_process import engine, serve
from polybatch import LLM, SamplingParams
from polybatch.engine.stub import stub_core
from polybatch.request import Deadlines, FinishReason
from polybatch.scheduling.costs import CostModel
from polybatch.scheduling.online_cost import OnlineCost
from polybatch.scheduling.track import BATCH_PRIORITY
from polybatch.simulate.engine import EngineSettings
from polybatch.simulate.traces import Trace, TraceRequest

COSTS = CostModel(base=0.001, per_token=1e-5)
TINY = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "dtype": "float32",
}  # fmt: skip


def requests(num: int, **more: Any) -> list[TraceRequest]:
    return [
        TraceRequest(request_id=f"r{i}", arrival_s=0.01 * i, num_input=5 + i, num_output=2 + i % 3, **more)
        for i in range(num)
    ]


@pytest.fixture
def llm(tmp_path: Path) -> Iterator[LLM]:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))
    with LLM(
        f"random:{config}", executor="eager", memory="1MiB", max_model_len=128, enable_prefix_caching=False
    ) as llm:
        yield llm


def test_every_request_gets_its_tokens_no_sooner_than_it_arrives() -> None:
    trace = Trace("t", tuple(requests(6)))
    found = serve(stub_core(), trace)
    assert [o.request for o in found.outcomes] == list(trace.requests)
    for outcome in found.outcomes:
        assert outcome.is_complete
        assert outcome.reason is FinishReason.LENGTH
        assert outcome.token_times == sorted(outcome.token_times)
        assert outcome.request.arrival_s <= outcome.token_times[0] <= found.end_s
        assert outcome.answer is None
    assert 0 < found.busy_s <= found.end_s
    assert found.num_steps > 0


def test_rows_of_batches_end_with_the_last_live_request() -> None:
    row = TraceRequest(request_id="row", arrival_s=0.0, num_input=5, num_output=4000, priority=BATCH_PRIORITY)
    core = stub_core()
    found = serve(core, Trace("t", (row, *requests(3))))
    assert not core.has_work()
    assert not found.outcomes[0].is_complete
    assert all(o.is_complete for o in found.outcomes[1:])


@pytest.mark.parametrize("policy", spot_check.POLICIES)
def test_policies_take_turns_on_one_model_and_leave_it_as_it_was(llm: LLM, policy: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=4)
    before = llm.generate([[1, 2, 3]], params)[0].outputs[0].token_ids
    settings = EngineSettings(policy=policy, max_num_batched_tokens=16, enable_prefix_caching=False)
    trace = Trace("t", tuple(requests(5, deadlines=Deadlines(ttft_s=60.0))))
    for _ in range(2):
        core = engine(llm, settings, OnlineCost(COSTS))
        found = serve(core, trace)
        assert [o.answer for o in found.outcomes] == [True] * 5
        assert found.told_s.keys() == {r.request_id for r in trace.requests}
        assert core.scheduler.stats().num_free_pages == core.scheduler.stats().num_pages
    assert llm.generate([[1, 2, 3]], params)[0].outputs[0].token_ids == before


def test_chats_are_the_same_for_every_policy_and_others_in_every_round() -> None:
    assert spot_check.chats(20, seed=1) == spot_check.chats(20, seed=1)
    assert spot_check.chats(20, seed=1) != spot_check.chats(20, seed=2)
