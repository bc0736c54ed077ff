"""GPTQ, AWQ and compressed-tensors checkpoints, packed here by their documented layouts, are read exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MODULES, SELF_ATTENTION, tiny_model
from safetensors.torch import load_file, save_file

from polybatch.errors import ModelError
from polybatch.models.checkpoint import CheckpointWeights
from polybatch.models.hugging_face import SINGLE, open_directory

GROUP = 32
Tensors = dict[str, torch.Tensor]


def word(nibbles: list[int]) -> int:
    """Eight 4-bit values as a signed 32-bit integer, the first in the lowest bits."""
    value = sum(n << (4 * i) for i, n in enumerate(nibbles))
    return value - 2**32 if value >= 2**31 else value


def pack_rows(matrix: torch.Tensor, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> torch.Tensor:
    """[a, b] small integers -> [a, ceil(b / 8)] int32, value `order[i]` of each eight at place i."""
    rows = []
    for row in torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % 8)).tolist():
        rows.append([word([row[at + i] for i in order]) for at in range(0, len(row), 8)])
    return torch.tensor(rows, dtype=torch.int32)


class Layer:
    """Random integers of one linear layer and, by the textbook, the floats that they stand for."""

    def __init__(self, seed: int, out: int, inputs: int, group: int, symmetric: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        groups = -(-inputs // group)
        self.values = torch.randint(0, 16, (out, inputs), generator=generator)
        self.scales = (torch.rand(out, groups, generator=generator) * 0.1 + 0.01).half()
        self.zeros = torch.full((out, groups), 8)
        if not symmetric:
            self.zeros = torch.randint(1, 16, (out, groups), generator=generator)
        group_of = torch.arange(inputs) // group
        self.weight = (self.values - self.zeros[:, group_of]) * self.scales.float()[:, group_of]


def gptq(layer: Layer) -> Tensors:
    inputs = layer.values.shape[1]
    return {
        "qweight": pack_rows(layer.values).T.contiguous(),
        "qzeros": pack_rows(layer.zeros.T - 1),
        "scales": layer.scales.T.contiguous(),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // (inputs // layer.scales.shape[1]),
    }


def gptq_v2(layer: Layer) -> Tensors:
    return {**gptq(layer), "qzeros": pack_rows(layer.zeros.T)}


def awq(layer: Layer) -> Tensors:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": pack_rows(layer.values.T, order),
        "qzeros": pack_rows(layer.zeros.T, order),
        "scales": layer.scales.T.contiguous(),
    }


def packed(layer: Layer) -> Tensors:
    return {
        "weight_packed": pack_rows(layer.values),
        "weight_scale": layer.scales,
        "weight_shape": torch.tensor(layer.values.shape),
    }


def packed_with_zeros(layer: Layer) -> Tensors:
    return {**packed(layer), "weight_zero_point": pack_rows(layer.zeros.T).T.contiguous()}


def compressed(group: int | None, **changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "channel" if group is None else "group",
               "group_size": group, "actorder": None}  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**weights, **changes}}},
        "ignore": ["lm_head"],
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
FORMATS: dict[str, tuple[Callable[[Layer], Tensors], dict[str, Any], int | None, bool]] = {
    "gptq": (gptq, GPTQ, GROUP, True),
    "gptq-asymmetric": (gptq, {**GPTQ, "sym": False}, GROUP, False),
    "gptq-per-column": (gptq, {**GPTQ, "group_size": -1}, None, True),
    "gptq-v2": (gptq_v2, {**GPTQ, "checkpoint_format": "gptq_v2"}, GROUP, False),
    "awq": (awq, AWQ, GROUP, False),
    "awq-old-names": (awq, {"quant_method": "awq", "w_bit": 4, "q_group_size": 16}, 16, False),
    "compressed": (packed, compressed(GROUP), GROUP, True),
    "compressed-per-channel": (packed, compressed(None), None, True),
    "compressed-asymmetric": (packed_with_zeros, compressed(GROUP, symmetric=False), GROUP, False),
}


def layer_name(index: int, module: str) -> str:
    return f"model.layers.{index}.{'self_attn' if module in SELF_ATTENTION else 'mlp'}.{module}"


def write(
    path: Path, pack: Callable[[Layer], Tensors], settings: dict[str, Any], group: int | None, symmetric: bool
) -> dict[tuple[int, str], Layer]:
    """A tiny Llama whose linear layers are packed; returns what they hold."""
    model = tiny_model("llama")
    model.save_pretrained(path)
    tensors = {name: t.clone() for name, t in load_file(path / SINGLE).items()}
    layers = {}
    for index in range(2):
        for module in MODULES:
            name = layer_name(index, module)
            out, inputs = tensors.pop(f"{name}.weight").shape
            layer = Layer(len(layers), out, inputs, group or inputs, symmetric)
            tensors |= {f"{name}.{part}": tensor for part, tensor in pack(layer).items()}
            layers[index, module] = layer
    save_file(tensors, path / SINGLE)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return layers


def edit(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    tensors = {key: t.clone() for key, t in load_file(path / SINGLE).items()}
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path / SINGLE)


@pytest.mark.parametrize("name", FORMATS)
def test_integers_scales_and_zeros_are_read_as_they_were_packed(name: str, tmp_path: Path) -> None:
    layers = write(tmp_path, *FORMATS[name])
    weights = open_directory(tmp_path)
    for (index, module), layer in layers.items():
        stored = weights.quantized_linear(index, module)
        assert stored is not None
        assert torch.equal(stored.values.long(), layer.values)
        assert torch.equal(stored.scales, layer.scales)
        zeros = torch.full_like(layer.zeros, 8) if stored.zeros is None else stored.zeros.long()
        assert torch.equal(zeros, layer.zeros)
        dequantised = weights.linear(index, module)
        assert torch.equal(dequantised, layer.weight.half())
        assert torch.equal(getattr(weights.layer(index), module.removesuffix("_proj")), dequantised)
    assert weights.lm_head().dtype is torch.float32


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_float8_weights_are_read_with_their_scales(strategy: str, tmp_path: Path) -> None:
    weights_config = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {"weights": weights_config, "input_activations": {"dynamic": True, "num_bits": 8}}
        },
    }

    def pack(layer: Layer) -> Tensors:
        values = (layer.values - 8.0).to(torch.float8_e4m3fn)
        return {"weight": values, "weight_scale": layer.scales if strategy == "channel" else layer.scales[0]}

    layers = write(tmp_path, pack, settings, None, True)
    weights = open_directory(tmp_path)
    for (index, module), layer in layers.items():
        scales = layer.scales.float() if strategy == "channel" else layer.scales[0].float()
        assert torch.equal(weights.linear(index, module), ((layer.values - 8) * scales).half())
        stored = weights.quantized_linear(index, module)
        assert stored is not None
        assert (stored.kind, stored.scales.shape) == ("fp8", (layer.values.shape[0], 1))


def test_layers_in_floats_are_left_as_they_are(tmp_path: Path) -> None:
    write(tmp_path, *FORMATS["gptq"])
    tensors = {key: t.clone() for key, t in load_file(tmp_path / SINGLE).items()}
    name = layer_name(1, "down_proj")
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{name}.{part}"]
    plain = torch.randn(64, 96)
    save_file({**tensors, f"{name}.weight": plain}, tmp_path / SINGLE)
    weights = open_directory(tmp_path)
    assert torch.equal(weights.linear(1, "down_proj"), plain)
    assert weights.quantized_linear(1, "down_proj") is None
    assert weights.quantized_linear(0, "down_proj") is not None


def test_only_biases_that_are_all_zero_may_be_surplus(tmp_path: Path) -> None:
    write(tmp_path, *FORMATS["gptq"])
    tensors = {key: t.clone() for key, t in load_file(tmp_path / SINGLE).items()}
    name = f"{layer_name(0, 'o_proj')}.bias"
    save_file({**tensors, name: torch.zeros(64).half()}, tmp_path / SINGLE)
    assert isinstance(open_directory(tmp_path), CheckpointWeights)
    save_file({**tensors, name: torch.ones(64).half()}, tmp_path / SINGLE)
    with pytest.raises(ModelError, match=f"holds the tensor {name}"):
        open_directory(tmp_path)


UP = layer_name(1, "up_proj")


@pytest.mark.parametrize(
    ("name", "part", "change", "complaint"),
    [
        ("gptq", "scales", None, rf"lacks {UP}.scales"),
        ("gptq", "scales", lambda t: t[:-1], r"scales has the shape \[1, 96\]; .* asks for \[2, 96\]"),
        ("gptq", "scales", lambda t: t.double(), "scales has the type F64; it must be F16 or BF16 or F32"),
        ("gptq", "qweight", lambda t: t.long(), "qweight has the type I64"),
        ("gptq", "qweight", lambda t: t[0], "two axes"),
        ("gptq", "qweight", lambda t: t[:4], r"up_proj.weight has the shape \[96, 32\]"),
        ("awq", "qzeros", lambda t: t[:, 1:], r"qzeros has the shape \[2, 11\]"),
        ("compressed", "weight_scale", lambda t: t[:, :1], r"asks for \[96, 2\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused_when_opened(
    name: str, part: str, change: Any, complaint: str, tmp_path: Path
) -> None:
    write(tmp_path, *FORMATS[name])
    edit(tmp_path, f"{UP}.{part}", change)
    with pytest.raises(ModelError, match=complaint):
        open_directory(tmp_path)


def test_groups_of_scattered_inputs_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, *FORMATS["gptq"])
    edit(tmp_path, f"{UP}.g_idx", lambda t: t.flip(0))
    with pytest.raises(ModelError, match=r"up_proj.g_idx .*activation order"):
        open_directory(tmp_path).linear(1, "up_proj")


def test_a_shape_that_contradicts_the_packed_values_is_refused(tmp_path: Path) -> None:
    write(tmp_path, *FORMATS["compressed"])
    edit(tmp_path, f"{UP}.weight_shape", lambda t: t.flip(0))
    with pytest.raises(ModelError, match=r"weight_shape is \[64, 96\]"):
        open_directory(tmp_path).linear(1, "up_proj")


FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel"}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"quant_method": "bitsandbytes"}, "quantised by 'bitsandbytes'; supported are gptq, awq"),
        ({}, "quant_method"),
        ({**GPTQ, "desc_act": True}, "desc_act .activation order. is not supported"),
        ({**GPTQ, "bits": 8}, "bits is 8; it must be 4"),
        ({**GPTQ, "group_size": 0}, "group_size is 0"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({**AWQ, "version": "gemv"}, "version is 'gemv'"),
        ({**compressed(GROUP), "format": "marlin-24"}, "format is 'marlin-24'"),
        (compressed(GROUP, num_bits=8), "num_bits is 8"),
        (compressed(GROUP, actorder="group"), "actorder is 'group'"),
        (compressed(GROUP, strategy="tensor_group"), "strategy is 'tensor_group'"),
        ({**compressed(GROUP), "config_groups": {}}, "config_groups"),
        ({**compressed(GROUP), "config_groups": {"a": 1}}, "a is 1"),
        ({**compressed(GROUP), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({**compressed(GROUP), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized",
             "config_groups": {"a": {"weights": FLOAT8, "input_activations": {"dynamic": False}}}},
            "input_activations",
        ),
    ],
)  # fmt: skip
def test_methods_that_are_not_supported_are_refused_by_name(
    settings: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    write(tmp_path, gptq, settings, GROUP, True)
    with pytest.raises(ModelError, match=complaint):
        open_directory(tmp_path)
