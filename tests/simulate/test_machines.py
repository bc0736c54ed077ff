"""Machines: built-in, from a profile, and scaled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polybatch.errors import ConfigError
from polybatch.simulate.machines import BUILT_IN, h100_8b, load_machine, scaled


def test_the_built_in_h100_is_as_measured() -> None:
    machine = h100_8b()
    for batch, seconds in ((1, 5.8e-3), (32, 6.85e-3), (64, 7.73e-3), (128, 9.33e-3), (256, 14.5e-3)):
        assert machine.decode_s(batch, 1000) == pytest.approx(seconds, rel=0.06)
    eight_prompts = 8192 / machine.prefill_s(8192)
    assert eight_prompts == pytest.approx(43_800, rel=0.2)
    assert machine.kv_bytes_per_token == 131_072
    assert machine.adapter_pages(16) * 2**21 == pytest.approx(84e6, rel=0.02)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_built_in_machines_are_found_by_name(name: str) -> None:
    assert load_machine(name).name == name


def test_a_profile_is_read_and_errors_name_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "box.json"
    content = {
        "costs": {"base": 0.01, "per_token": 0.001},
        "pool": {"num_pages": 10, "page_size": 16, "page_bytes": 64, "num_layers": 2},
        "adapter_bytes_per_rank": 100,
    }
    path.write_text(json.dumps(content))
    assert load_machine(str(path)).decode_s(2, 5) == pytest.approx(0.012)
    path.write_text(json.dumps({**content, "costs": {"base": 1, "per_word": 2}}))
    with pytest.raises(ConfigError, match="per_word"):
        load_machine(str(path))
    path.write_text(json.dumps({"costs": {}, "speed": 1}))
    with pytest.raises(ConfigError, match=r"speed.*lacks.*pool"):
        load_machine(str(path))
    path.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        load_machine(str(path))
    with pytest.raises(ConfigError, match=r"machine is 'warp'.*h100-8b"):
        load_machine("warp")


def test_a_scaled_machine_is_an_estimate_that_grows_with_the_model_and_shrinks_with_devices() -> None:
    machine = h100_8b()
    larger, shared = scaled(machine, parameters=2), scaled(machine, num_devices=2)
    assert larger.is_estimate
    assert larger.decode_s(1, 100) == pytest.approx(2 * machine.decode_s(1, 100), rel=0.05)
    assert shared.decode_s(1, 100) == pytest.approx(machine.decode_s(1, 100) / 1.7, rel=0.05)
    assert shared.pool.num_pages == 2 * machine.pool.num_pages
    with pytest.raises(ConfigError, match="parameters is 0"):
        scaled(machine, parameters=0)
