"""Designed steps are what they say, run through the real loop, and leave the engine as it was."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from engine_helpers import make_core

from polybatch.cli.calibrate import coefficient_table, meanings
from polybatch.cli.main import main
from polybatch.engine import calibrate as calibration
from polybatch.engine.calibrate import Calibration, calibrate
from polybatch.engine.cost_files import profile_path
from polybatch.engine.designed_steps import DesignedStep, Room, designs, mixed_designs
from polybatch.engine.llm import LLM
from polybatch.errors import ConfigError
from polybatch.execution.fake import FakeAheadExecutor, FakeExecutor
from polybatch.request import SamplingParams
from polybatch.sampling.sampler import Sampled
from polybatch.scheduling.cost_profile import load_profile, save_profile
from polybatch.scheduling.costs import COEFFICIENTS

CONFIG = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 1000.0, "dtype": "float32",
}  # fmt: skip
ROOM = Room(64, 1024, 8192, 1 << 20, 48 * 1024, 2, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return f"random:{path}"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def open_llm(model: str) -> LLM:
    return LLM(
        model, executor="eager", dtype="float32", memory="8MiB", max_num_seqs=6, max_num_batched_tokens=64,
        threads=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(model: str) -> Iterator[tuple[LLM, Calibration]]:
    with closing(open_llm(model)) as llm, pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "MIN_ROUNDS", 1)
        patch.setattr(calibration, "NUM_HELD_OUT", 8)
        yield llm, calibrate(llm, budget_s=0.0)


def test_designs_stay_within_their_room_and_are_not_those_of_the_test() -> None:
    fitted = [*designs(ROOM), *mixed_designs(ROOM, 16, 1)]
    held_out = mixed_designs(ROOM, 32, 2, apart_from=fitted)
    for step in [*fitted, *held_out]:
        assert 0 < step.num_rows <= 64
        assert step.num_prefill_tokens <= 1024
        assert step.max_len <= 8192
        assert step.num_kv_tokens <= 48 * 1024
    assert not set(fitted) & set(held_out)
    assert mixed_designs(ROOM, 32, 2, apart_from=fitted) == held_out


def test_designs_show_every_amount() -> None:
    steps = designs(ROOM)
    assert any(step.shared for step in steps)
    assert any(step.loads for step in steps)
    assert any(step.decodes and step.prefills for step in steps)
    assert {len(step.decodes) for step in steps} >= {1, 2, 4, 8, 16, 32, 64}
    assert any((0, 0) in step.adapters for step in steps), "the user's adapter is measured"


def test_what_is_measured_is_what_was_designed(measured: tuple[LLM, Calibration]) -> None:
    _, found = measured
    shapes = [step.shape for step in found.fitted]
    assert any(
        (s.num_tokens, s.num_decodes, s.decode_context, s.num_logits, s.num_adapters) == (4, 4, 132, 4, 0)
        for s in shapes
    )
    assert any(s.num_prefill_tokens == 64 and s.prefill_pairs == 64 * 65 // 2 for s in shapes)
    assert any(s.adapter_pages and s.adapter_work for s in shapes)
    assert any(s.load_pages for s in shapes)
    assert all(min(step.seconds) > 0 for step in (*found.fitted, *found.held_out))
    assert len(found.held_out) == 8


def test_the_engine_serves_as_before_and_knows_its_own_adapters_alone(
    measured: tuple[LLM, Calibration], model: str
) -> None:
    llm, _ = measured
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    found = llm.generate([[1, 2, 3], [4] * 40], params)
    with closing(open_llm(model)) as fresh:
        expected = fresh.generate([[1, 2, 3], [4] * 40], params)
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in expected]
    assert llm.list_adapters() == []


def test_an_engine_with_requests_is_not_calibrated(measured: tuple[LLM, Calibration]) -> None:
    llm, _ = measured
    llm.core.add_request("busy", [1, 2, 3])
    try:
        with pytest.raises(ConfigError, match="before it serves"):
            calibrate(llm)
    finally:
        llm.core.abort("busy")


def test_a_kept_profile_is_what_the_next_engine_begins_with(
    measured: tuple[LLM, Calibration], model: str, caplog: pytest.LogCaptureFixture
) -> None:
    llm, found = measured
    assert not llm.core.costs.is_calibrated
    profile = found.profile(llm)
    path = profile_path(llm.cost_key)
    save_profile(profile, path)
    with closing(open_llm(model)) as again:
        assert again.core.costs.is_calibrated
        assert again.core.costs.model == profile.model
        # Designed steps have no watched rows; what those cost besides is measured apart.
        assert found.row_output_s > 0
        assert profile.model.per_logit == found.model.per_logit + found.row_output_s
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(profile, format=99)))
    with closing(open_llm(model)) as other:
        assert not other.core.costs.is_calibrated
    assert "format 99" in caplog.text
    path.unlink()


def test_what_is_printed_names_every_coefficient_and_the_error(measured: tuple[LLM, Calibration]) -> None:
    llm, found = measured
    profile = msgspec.structs.replace(
        found.profile(llm),
        coefficients=dict.fromkeys(COEFFICIENTS, 0.001),
        p95_error=0.123,
    )
    assert coefficient_table(profile).row_count == len(COEFFICIENTS)
    told = "\n".join(meanings(profile))
    assert "P95 error 12.3%" in told
    assert "a decode step of 32 rows at 1,000 tokens of context: " in told


def test_the_command_keeps_a_profile_in_the_cache_and_beside(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "MIN_ROUNDS", 1)
    monkeypatch.setattr(calibration, "designs", lambda room: [DesignedStep((8,)), DesignedStep((8,) * 3)])
    monkeypatch.setattr(calibration, "NUM_MIXED", 2)
    monkeypatch.setattr(calibration, "NUM_HELD_OUT", 2)
    out = tmp_path / "costs.json"
    with pytest.raises(SystemExit) as caught:
        main(
            ["calibrate", model, "--executor", "eager", "--dtype", "float32", "--memory", "8MiB",
             "--threads", "1", "--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--seconds", "1",
             "--out", str(out)]
        )  # fmt: skip
    assert caught.value.code == 0
    assert "P95 error" in capsys.readouterr().out
    profile = load_profile(out)
    assert load_profile(profile_path(profile.key)) == profile
    profile_path(profile.key).unlink()


def test_the_stub_has_no_costs_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["calibrate", "stub"])
    assert caught.value.code == 2
    assert "computes nothing" in capsys.readouterr().err


class SlowLaunch:
    """Lands so long after its launch, or after the one before."""

    lands = 0.0

    def __init__(self, sampled: Sampled, seconds: float) -> None:
        self._sampled = sampled
        SlowLaunch.lands = self._at = max(SlowLaunch.lands, time.perf_counter()) + seconds

    def sampled(self) -> Sampled:
        time.sleep(max(0.0, self._at - time.perf_counter()))
        return self._sampled


def test_a_step_that_overlaps_the_one_before_takes_the_time_between_their_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prefill that takes 20 times as long as a decode is not charged to its neighbours."""
    launch = FakeAheadExecutor.launch

    def slow(self: FakeAheadExecutor, plan: object, *rest: object) -> SlowLaunch:
        sampled = launch(self, plan, *rest)._sampled  # type: ignore[arg-type]
        return SlowLaunch(sampled, 0.1 if plan.num_tokens > 20 else 0.005)  # type: ignore[attr-defined]

    monkeypatch.setattr(FakeAheadExecutor, "launch", slow)
    core = make_core(executor=FakeAheadExecutor(), num_pages=1024)
    core.add_request("one", [1, 2, 3], SamplingParams(max_tokens=30, ignore_eos=True))
    for _ in range(10):
        core.step()
    core.add_request("two", list(range(1, 61)), SamplingParams(max_tokens=5, ignore_eos=True))
    while core.has_work():
        core.step()
    steps = core.step_log.steps_after(-1)
    long = [step.duration_s for step in steps if step.prefill.get("", 0) > 20]
    short = [step.duration_s for step in steps if step.prefill.get("", 0) <= 20]
    assert len(long) == 1
    assert [step.index for step in steps] == list(range(len(steps)))
    assert long[0] > 0.09
    assert statistics.median(short) < 0.05


def test_predictions_are_noted_once_there_is_something_to_go_by() -> None:
    core = make_core(executor=FakeExecutor(), num_pages=1024)
    core.add_request("one", [1, 2, 3], SamplingParams(max_tokens=60, ignore_eos=True))
    while core.has_work():
        core.step()
    steps = core.step_log.steps_after(-1)
    assert all(step.predicted_s is None for step in steps[:16])
    assert all(step.predicted_s is not None for step in steps[17:])
    assert len(core.step_log.prediction_errors()) == sum(step.predicted_s is not None for step in steps)


def test_beside_a_busy_neighbour_a_few_quiet_visits_are_what_counts() -> None:
    """However many visits were slowed down, those that agree are the fastest."""
    quiet = [0.0100, 0.0101, 0.0102]
    visits = [calibration._Timed(0.0, seconds) for seconds in (0.019, quiet[2], 0.021, *quiet[:2], 0.018)]
    assert calibration._fastest(visits) == (tuple(quiet), 0.0)
    assert calibration._fastest(visits[:1]) == ((0.019,), 0.0)
