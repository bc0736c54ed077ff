"""Deadlines in the engine: given up truthfully, told at arrival, counted at the end."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_helpers import run

from polybatch.engine.core import EngineCore
from polybatch.engine.stub import stub_core
from polybatch.errors import DeadlineError
from polybatch.request import Deadlines, FinishReason, Request, SamplingParams
from polybatch.scheduling.online_cost import MIN_FITTED


def request_of(core: EngineCore, name: str, deadlines: Deadlines | None, n: int = 1) -> Request:
    params = SamplingParams(max_tokens=5, ignore_eos=True, n=n)
    return replace(core.door.prepare(name, [1, 2, 3], params), deadlines=deadlines)


def warm_up(core: EngineCore) -> None:
    """Run the steps that a model which was not calibrated needs to see before it tells anything."""
    params = SamplingParams(max_tokens=MIN_FITTED + 4, ignore_eos=True)
    core.submit(core.door.prepare("warm-up", [1, 2, 3], params))
    run(core)


@pytest.mark.parametrize("policy", ["deadline", "early_abort"])
def test_a_request_that_is_given_up_ends_with_an_error_that_says_why_and_no_other_does(policy: str) -> None:
    core = stub_core(policy=policy, max_num_seqs=1, service={"abort_late": True})
    core.submit(request_of(core, "fine", None))
    core.submit(request_of(core, "late", Deadlines(ttft_s=1e-6), n=2))
    outputs = run(core)
    assert outputs["late"].outputs[0].finish_reason is FinishReason.ERROR
    assert "first token" in (outputs["late"].error or "")
    assert outputs["late"].error_kind == DeadlineError.__name__
    assert len(outputs["fine"].outputs[0].token_ids) == 5
    assert core.stats().deadlines.ttft_missed == 1


def test_a_request_knows_at_its_end_what_was_predicted_and_what_was_kept() -> None:
    core = stub_core(service={"ttft_s": 60.0})
    warm_up(core)
    core.submit(request_of(core, "own", Deadlines(ttft_s=60.0, tpot_s=60.0, e2e_s=1e-6)))
    core.submit(request_of(core, "default", None))
    outputs = run(core)
    own, default = outputs["own"].metrics, outputs["default"].metrics
    assert own is not None
    assert default is not None
    assert own.missed == ("e2e",)
    assert (own.ttft_met, own.tpot_met, own.e2e_met) == (True, True, False)
    assert (default.ttft_met, default.tpot_met, default.e2e_met) == (True, None, None)
    counts = core.stats().deadlines
    # The warm-up had the default deadline too.
    assert (counts.ttft_met, counts.tpot_met, counts.e2e_missed) == (3, 1, 1)


def test_a_refused_request_leaves_the_engine_as_it_was() -> None:
    core = stub_core(service={"refuse_late": True})
    warm_up(core)
    with pytest.raises(DeadlineError, match="e2e"):
        core.submit(request_of(core, "late", Deadlines(e2e_s=1e-6)))
    assert not core.has_work()
    core.submit(request_of(core, "late", None))
    assert set(run(core)) == {"late"}
