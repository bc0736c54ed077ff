"""Laws of the carried adapter's benchmark: its checks pass what is right and find what is not."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.cuda import carried as benchmark
from benchmarks.cuda.carried import NOW, TINY, Model, check
from polybatch.kernels.lora import cuda_carried
from polybatch.kernels.lora.cuda_carried import Carrier

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def model() -> Model:
    return Model(TINY, 2, torch.float16, DEVICE)


@pytest.mark.parametrize("blocking", NOW, ids=benchmark.name_of)
def test_every_chosen_blocking_passes(model, blocking, monkeypatch):
    monkeypatch.setattr(cuda_carried, "BLOCKINGS", ((50, blocking),))
    error, wrong = check(model, 50)
    assert 0 < error < 1e-3
    assert wrong == []


def test_silu_mul_is_checked_where_it_leaves_h(model, monkeypatch):
    monkeypatch.setattr(cuda_carried, "SILU_ROWS", 1)
    assert check(model, 20)[1] == []
    monkeypatch.setattr(Carrier, "silu_mul", lambda *args: None)
    _, wrong = check(model, 20)
    assert len(wrong) == 3
    assert all("silu_mul of 20 rows" in each for each in wrong)


def test_what_is_not_written_is_found(model, monkeypatch):
    monkeypatch.setattr(Carrier, "take", lambda *args: None)
    _, wrong = check(model, 16)
    assert sum("relative error nan" in each for each in wrong) == 4


def test_an_adapter_on_the_wrong_rows_is_found(model, monkeypatch):
    fill = benchmark.carried.fill
    monkeypatch.setattr(
        benchmark.carried, "fill", lambda views, first, last, row: fill(views, first - 1, last, row)
    )
    _, wrong = check(model, 16)
    assert sum("rows without the adapter are not 0" in each for each in wrong) == 4


@pytest.mark.skipif(DEVICE == "cuda", reason="would time the real model")
def test_the_exit_status_tells_whether_checks_passed(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "CHECKED_ROWS", (16,))
    file = tmp_path / "carried.json"
    benchmark.main(["--device", "cpu", "--json", str(file)])
    assert list(json.loads(file.read_text())["errors"]) == ["16"]
    monkeypatch.setattr(Carrier, "shrink", lambda *args: None)
    with pytest.raises(SystemExit, match="qkv of 16 rows") as ended:
        benchmark.main(["--device", "cpu"])
    assert ended.value.code != 0
