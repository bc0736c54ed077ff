"""A rank's part of a model and of its adapters; how they are cut stands in `ranks`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from polybatch.adapters.weights import AdapterWeights, ModuleDelta
from polybatch.config import ModelSpec
from polybatch.errors import ConfigError
from polybatch.models.weights import LayerWeights, ModelWeights

ROW_PARALLEL = ("o_proj", "down_proj")
"""Modules whose outputs are sums over ranks."""

_BY_OUTPUT = ("q", "k", "v", "gate", "up")
_SPLIT = ("num_heads", "num_kv_heads", "intermediate_size")


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `rank` of `size` equal ones."""

    rank: int
    size: int

    def cut(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """This part of an axis, a view."""
        share = x.shape[axis] // self.size
        return x.narrow(axis, self.rank * share, share)


def shard_spec(spec: ModelSpec, size: int) -> ModelSpec:
    """The model as one rank computes it: its heads and its part of the MLP.

    Raises ConfigError where the model cannot be cut into so many equal parts.
    """
    for name in (*_SPLIT, "hidden_size"):
        value = getattr(spec, name)
        if value % size:
            raise ConfigError(
                f"tensor_parallel_size is {size}, which does not divide the model's {name}, {value}: "
                "choose a divisor of it, or 1"
            )
    return dataclasses.replace(spec, **{name: getattr(spec, name) // size for name in _SPLIT})


def row_spec(shard: ModelSpec, size: int) -> ModelSpec:
    """A shard's spec whose `linear_shapes` are those of adapter rows: both axes are cut."""
    return dataclasses.replace(shard, hidden_size=shard.hidden_size // size)


class ShardedWeights:
    """One rank's part of a model's weights; a `ModelWeights`.

    Embedding and vocabulary head are whole on rank 0 and have no rows on the others. Every call reads the
    whole tensor and gives a view of it, so that one layer is in memory at a time.
    """

    def __init__(self, whole: ModelWeights, shard: Shard) -> None:
        self._whole, self._shard = whole, shard
        self._spec = shard_spec(whole.spec, shard.size)

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    def embedding(self) -> torch.Tensor:
        return self._whole.embedding() if self._shard.rank == 0 else torch.empty(0, self._spec.hidden_size)

    def lm_head(self) -> torch.Tensor:
        return self._whole.lm_head() if self._shard.rank == 0 else torch.empty(0, self._spec.hidden_size)

    def final_norm(self) -> torch.Tensor:
        return self._whole.final_norm()

    def layer(self, index: int) -> LayerWeights:
        whole = self._whole.layer(index)
        parts: dict[str, Any] = {name: self._shard.cut(getattr(whole, name), 0) for name in _BY_OUTPUT}
        for name in _BY_OUTPUT:
            bias = getattr(whole, f"{name}_bias")
            parts[f"{name}_bias"] = None if bias is None else self._shard.cut(bias, 0)
        # The biases of o and down are added after the sum over ranks, so they stay whole.
        parts |= {name: self._shard.cut(getattr(whole, name), 1) for name in ("o", "down")}
        return dataclasses.replace(whole, **parts)

    def linear(self, layer: int, module: str) -> torch.Tensor:
        return self._shard.cut(self._whole.linear(layer, module), 1 if module in ROW_PARALLEL else 0)


@dataclass(frozen=True, slots=True)
class SumScale:
    """What an adapter does to a sum over ranks: out = gain * out + bias, in this rank's columns.

    gain, bias: [hidden / size] float32.
    """

    gain: torch.Tensor
    bias: torch.Tensor


SumScales = tuple[dict[str, SumScale], ...]
"""Per layer, module -> what follows its sum; only where an adapter brings a gain."""


def shard_adapter(weights: AdapterWeights, shard: Shard) -> tuple[AdapterWeights, SumScales]:
    """One rank's part of an adapter: every row of A cut by its inputs, all else by its outputs.

    A gain of o or down applies to the sum over ranks. It and the bias that goes with it come apart.
    The vocabulary's deltas stay with the whole adapter, for rank 0.
    """
    layers, scales = [], []
    for deltas in weights.layers:
        layer: dict[str, ModuleDelta] = {}
        scale: dict[str, SumScale] = {}
        for module, delta in deltas.items():
            gain = None if delta.gain is None else shard.cut(delta.gain, 0)
            bias = None if delta.bias is None else shard.cut(delta.bias, 0)
            if gain is not None and module in ROW_PARALLEL:
                scale[module] = SumScale(gain, torch.zeros_like(gain) if bias is None else bias)
                gain = bias = None
            layer[module] = ModuleDelta(shard.cut(delta.a, 1), shard.cut(delta.b, 1), gain, bias)
        layers.append(layer)
        scales.append(scale)
    return AdapterWeights(weights.digest, tuple(layers)), tuple(scales)
