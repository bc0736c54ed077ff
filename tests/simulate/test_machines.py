"""Machines: built-in, from a profile, and scaled."""

from __future__ import annotations

from pathlib import Path

import pytest

from polybatch.errors import ConfigError
from polybatch.scheduling.cost_profile import (
    FORMAT,
    CostKey,
    CostProfile,
    EngineLimits,
    PoolShape,
    save_profile,
)
from polybatch.scheduling.costs import COEFFICIENTS
from polybatch.simulate.machines import BUILT_IN, h100_8b, load_machine, scaled


def test_the_built_in_h100_is_as_measured() -> None:
    machine = h100_8b()
    for batch, seconds in ((1, 5.8e-3), (32, 6.85e-3), (64, 7.73e-3), (128, 9.33e-3), (256, 14e-3)):
        assert machine.decode_s(batch, 500) == pytest.approx(seconds, rel=0.12)
    eight_prompts = 8192 / machine.prefill_s(8192)
    assert eight_prompts == pytest.approx(43_800, rel=0.2)
    assert machine.kv_bytes_per_token == 131_072
    assert machine.adapter_pages(16) * 2**21 == pytest.approx(84e6, rel=0.02)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_built_in_machines_are_found_by_name(name: str) -> None:
    assert load_machine(name).name == name


def test_a_calibrated_profile_is_a_machine(tmp_path: Path) -> None:
    key = CostKey(
        device="box", threads=2, model="m", fingerprint="f", executor="cpu", dtype="bfloat16",
        quantization=None, kv_dtype="bfloat16", tensor_parallel_size=2,
    )  # fmt: skip
    coefficients = {**dict.fromkeys(COEFFICIENTS, 0.0), "base": 0.01, "per_token": 0.001}
    profile = CostProfile(
        format=FORMAT, key=key, coefficients=coefficients, hinge=0, row_sizes=(),
        median_error=0.1, p95_error=0.2,
        num_fitted=3, num_held_out=3, num_disturbed=0, adapter_bytes_per_rank=100.0, created="", version="0",
        pool=PoolShape(num_pages=10, page_size=16, page_bytes=64, num_layers=2),
        limits=EngineLimits(max_num_batched_tokens=64, max_num_seqs=4, max_model_len=128),
    )  # fmt: skip
    save_profile(profile, tmp_path / "box.json")
    machine = load_machine(str(tmp_path / "box.json"))
    assert machine.decode_s(2, 5) == pytest.approx(0.012)
    assert (machine.name, machine.num_devices, machine.pool.num_pages) == ("box", 2, 10)
    assert (machine.max_num_batched_tokens, machine.max_num_seqs, machine.max_model_len) == (64, 4, 128)


def test_what_is_no_machine_is_refused(tmp_path: Path) -> None:
    (tmp_path / "box.json").write_text("{")
    with pytest.raises(ConfigError, match=r"box.json is no cost profile"):
        load_machine(str(tmp_path / "box.json"))
    with pytest.raises(ConfigError, match=r"machine is 'warp'.*h100-8b"):
        load_machine("warp")


def test_a_scaled_machine_is_an_estimate_that_grows_with_the_model_and_shrinks_with_devices() -> None:
    machine = h100_8b()
    larger, shared = scaled(machine, parameters=2), scaled(machine, num_devices=2)
    assert larger.is_estimate
    assert larger.decode_s(1, 100) == pytest.approx(2 * machine.decode_s(1, 100), rel=0.05)
    assert shared.decode_s(1, 100) == pytest.approx(machine.decode_s(1, 100) / 1.7, rel=0.05)
    assert shared.pool.num_pages == 2 * machine.pool.num_pages
    slower = scaled(machine, arithmetic=0.5, bandwidth=0.25)
    assert slower.decode_s(1, 100) == pytest.approx(4 * machine.decode_s(1, 100), rel=0.05)
    assert slower.prefill_s(100_000) == pytest.approx(2 * machine.prefill_s(100_000), rel=0.2)
    with pytest.raises(ConfigError, match="parameters is 0"):
        scaled(machine, parameters=0)
