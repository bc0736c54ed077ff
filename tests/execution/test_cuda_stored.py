"""Quantised checkpoints on the GPU's executor: what is stored is what is computed with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

from polybatch.execution.cuda_model import FUSED, DeviceWeights
from polybatch.execution.cuda_stored import stored_product
from polybatch.kernels.linear.cuda import LinearWorkspace, pack
from polybatch.models.checkpoint import CheckpointWeights
from polybatch.models.hugging_face import open_directory
from tests.kernels.test_linear_cuda import loop_bounds_of_one_element  # noqa: F401 - a fixture
from tests.models import test_quantized_checkpoints as checkpoints

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Written = dict[tuple[int, str], checkpoints.Layer]
FORMATS: dict[str, tuple[Callable[..., Any], dict[str, Any], int | None, bool]] = {
    "gptq": (checkpoints.gptq, {**checkpoints.GPTQ, "group_size": 128}, 128, True),
    "gptq-per-column": (checkpoints.gptq, {**checkpoints.GPTQ, "group_size": -1}, None, True),
    "awq": (checkpoints.awq, {**checkpoints.AWQ, "group_size": 128}, 128, False),
    "compressed": (checkpoints.packed, checkpoints.compressed(128), 128, True),
}


@pytest.fixture
def write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[CheckpointWeights, Written]]:
    monkeypatch.setattr(
        checkpoints,
        "tiny_model",
        lambda name: helpers.tiny_model(name, hidden_size=128, intermediate_size=256, num_hidden_layers=2),
    )

    def make(*form: Any) -> tuple[CheckpointWeights, Written]:
        layers = checkpoints.write(tmp_path, *form)
        return open_directory(tmp_path), layers

    return make


def held(weights: CheckpointWeights, scheme: str | None, dtype: torch.dtype) -> DeviceWeights:
    space = LinearWorkspace(DEVICE, dtype, 512)
    return DeviceWeights(
        weights, dtype, torch.device(DEVICE), lambda _, weight: pack(weight, scheme, space), scheme=scheme
    )


def columns_of(
    weights: DeviceWeights, layer: int, name: str, inputs: int, dtype: torch.dtype
) -> torch.Tensor:
    """[out, 16]: what a product holds for 16 of its inputs."""
    linear = weights.layers[layer].products[name]
    picked = torch.arange(16) * (inputs // 16)
    x = torch.nn.functional.one_hot(picked, inputs).to(DEVICE, dtype)
    rows = {"qkv": 256, "o": 128, "gate_up": 512, "down": 128}[name]
    out = torch.full((16, rows), float("nan"), dtype=dtype, device=DEVICE)
    linear.forward(x, out)
    return out.T.cpu()


@pytest.mark.parametrize("name", FORMATS)
def test_a_product_holds_what_the_checkpoint_stores_to_the_last_bit(
    name: str, write: Callable[..., tuple[CheckpointWeights, Written]]
) -> None:
    weights, layers = write(*FORMATS[name])
    device = held(weights, "int4", torch.float16)
    for product, parts in FUSED.items():
        exact = torch.cat([layers[1, f"{part}_proj"].weight for part in parts])
        inputs = exact.shape[1]
        expected = exact[:, torch.arange(16) * (inputs // 16)].half()
        assert torch.equal(columns_of(device, 1, product, inputs, torch.float16), expected)


def test_only_what_the_kernels_keep_is_taken_as_it_is_stored(
    write: Callable[..., tuple[CheckpointWeights, Written]],
) -> None:
    weights, _ = write(*checkpoints.FORMATS["gptq"])  # groups of 32
    assert stored_product(weights, 0, ["o_proj"], "int4") is None
    weights, _ = write(*FORMATS["gptq"])
    assert stored_product(weights, 0, ["o_proj"], "int4") is not None
    assert stored_product(weights, 0, ["o_proj"], "fp8") is None
    assert stored_product(weights, 0, ["o_proj"], None) is None


def test_weights_stored_in_smaller_groups_are_read_as_floats_and_rounded(
    write: Callable[..., tuple[CheckpointWeights, Written]],
) -> None:
    weights, layers = write(*checkpoints.FORMATS["gptq"])
    got = columns_of(held(weights, "int4", torch.bfloat16), 0, "o", 128, torch.bfloat16).float()
    exact = layers[0, "o_proj"].weight[:, torch.arange(16) * 8]
    assert 1e-3 < float((got - exact).norm() / exact.norm()) < 0.2


def test_without_a_quantization_the_floats_are_those_of_the_checkpoint(
    write: Callable[..., tuple[CheckpointWeights, Written]],
) -> None:
    weights, layers = write(*FORMATS["awq"])
    device = held(weights, None, torch.float32)
    got = columns_of(device, 0, "down", 256, torch.float32)
    assert torch.equal(got, layers[0, "down_proj"].weight[:, torch.arange(16) * 16].half().float())
