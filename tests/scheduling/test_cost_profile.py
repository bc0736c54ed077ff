"""A profile survives its journey, and nothing but a profile is taken for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from polybatch.errors import ConfigError
from polybatch.scheduling.cost_profile import (
    FORMAT,
    MAX_FILE_BYTES,
    CostKey,
    CostProfile,
    EngineLimits,
    PoolShape,
    load_profile,
    parse_profile,
    save_profile,
)
from polybatch.scheduling.costs import COEFFICIENTS, CostModel

KEY = CostKey(
    device="AMD EPYC", threads=2, model="models/some model", fingerprint="f00d", executor="cpu",
    dtype="bfloat16", quantization=None, kv_dtype="bfloat16", tensor_parallel_size=1,
)  # fmt: skip


def profile(**changes: Any) -> CostProfile:
    coefficients = {name: 1e-6 * i for i, name in enumerate(COEFFICIENTS, 1)}
    made = CostProfile(
        format=FORMAT, key=KEY, coefficients=coefficients, hinge=64, row_sizes=(1, 2, 4),
        mixed_sizes=(16, 32), median_error=0.03,
        p95_error=0.1, num_fitted=60, num_held_out=32, num_disturbed=0,
        pool=PoolShape(num_pages=10, page_size=16, page_bytes=64, num_layers=2),
        limits=EngineLimits(max_num_batched_tokens=2048, max_num_seqs=256, max_model_len=4096),
        adapter_bytes_per_rank=1e5, created="2026-01-01T00:00:00+00:00", version="0.1.0",
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def content(**changes: Any) -> bytes:
    return json.dumps(json.loads(msgspec.json.encode(profile())) | changes).encode()


def test_a_profile_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "profile.json"
    save_profile(profile(), path)
    found = load_profile(path)
    assert found == profile()
    assert found.model == CostModel(
        **profile().coefficients,
        hinge=64,
        row_sizes=(1, 2, 4),
        mixed_sizes=(16, 32),
    )
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "no cost profile"),
        (b"[]", "no cost profile"),
        (b"\xff\xfe", "no cost profile"),
        (content(format=FORMAT + 1), "format"),
        (content(surprise=1), "surprise"),
        (content(hinge="64"), "hinge"),
        (content(hinge=-1), "hinge"),
        (content(row_sizes=[4, 2]), "row_sizes"),
        (content(mixed_sizes=[0, 2]), "mixed_sizes"),
        (content(coefficients={"base": 1.0}), "per_token"),
        (content(coefficients=profile().coefficients | {"extra": 1.0}), "extra"),
        (content(coefficients=profile().coefficients | {"per_pair": -1.0}), "per_pair"),
        (content(coefficients=dict.fromkeys(COEFFICIENTS, 0.0)), "cost nothing"),
        (content(pool={"num_pages": 1}), "page_size"),
    ],
)
def test_anything_else_is_refused_by_name(data: bytes, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        parse_profile(data, "costs.json")
    assert "costs.json" in str(caught.value)
    assert "polybatch calibrate" in str(caught.value)


def test_a_huge_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    path.write_bytes(b" " * (MAX_FILE_BYTES + 2))
    with pytest.raises(ConfigError, match="bytes"):
        load_profile(path)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile(tmp_path / "none.json")


@pytest.mark.parametrize(
    "change",
    [
        {"device": "other"},
        {"threads": 4},
        {"fingerprint": "beef"},
        {"dtype": "float32"},
        {"kv_dtype": "float32"},
        {"quantization": "int8"},
        {"tensor_parallel_size": 2},
        {"executor": "eager"},
    ],
)
def test_whatever_the_costs_depend_on_has_a_file_of_its_own(change: dict[str, Any]) -> None:
    assert msgspec.structs.replace(KEY, **change).file_name != KEY.file_name


def test_the_same_checkpoint_under_another_path_has_the_same_costs() -> None:
    moved = msgspec.structs.replace(KEY, model="/elsewhere/some model/")
    assert moved.file_name == KEY.file_name
    assert "/" not in KEY.file_name
