"""Quantised linear weights as checkpoints hold them, one value in one byte, in one form for all formats.

Four bits: W ~ (values - zeros) * scales, over groups of consecutive inputs or whole output channels, where
symmetric quantisation has zero 8 everywhere. Eight bits: W ~ values * scales with values in float8 e4m3.
Kernels rearrange this into layouts of their own; who has no kernel for it takes `dequantize_symmetric`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from polybatch.errors import ConfigError, EngineError

ZERO = 8

Kind = Literal["int4", "fp8"]


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A quantised linear weight.

    values: [out, in]; uint8 0 to 15 ("int4") or float8_e4m3fn ("fp8").
    scales: [out, groups], float; group g holds the inputs from g * group_size on, the last may be shorter.
    zeros: [out, groups] uint8, 0 to 16, or None where all are 8. Only for "int4".
    """

    kind: Kind
    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group_size: int

    def __post_init__(self) -> None:
        out, inputs = self.values.shape
        expected = (out, -(-inputs // self.group_size))
        dtype = torch.uint8 if self.kind == "int4" else torch.float8_e4m3fn
        if self.values.dtype != dtype:
            raise EngineError(f"{self.kind} values have the dtype {self.values.dtype}, not {dtype}")
        for name, table in (("scales", self.scales), ("zeros", self.zeros)):
            if table is not None and tuple(table.shape) != expected:
                raise EngineError(f"{name} have the shape {list(table.shape)}, not {list(expected)}")
        if self.kind == "fp8" and (expected[1] != 1 or self.zeros is not None):
            raise EngineError("fp8 weights have one scale per output channel and no zeros")

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def is_per_channel(self) -> bool:
        return self.scales.shape[1] == 1

    def to(self, device: torch.device | str) -> QuantizedTensor:
        zeros = None if self.zeros is None else self.zeros.to(device)
        return QuantizedTensor(
            self.kind, self.values.to(device), self.scales.to(device), zeros, self.group_size
        )


def dequantize_symmetric(weight: QuantizedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[out, in]: products of integers and scales in float32, rounded once to `dtype`."""
    inputs = weight.values.shape[1]
    wide = weight.values.float()
    if weight.kind == "int4":
        wide -= float(ZERO) if weight.zeros is None else _spread(weight.zeros, weight.group_size, inputs)
    return (wide * _spread(weight.scales, weight.group_size, inputs)).to(dtype)


def _spread(table: torch.Tensor, group_size: int, inputs: int) -> torch.Tensor:
    """[out, groups] -> [out, inputs] float32."""
    return table.float().repeat_interleave(group_size, dim=1)[:, :inputs]


def concatenate(weights: list[QuantizedTensor]) -> QuantizedTensor:
    """Stack weights that share their inputs along the outputs, as q, k and v are.

    Raises ConfigError where kinds or groups differ.
    """
    first = weights[0]
    if any(
        (w.kind, w.group_size, w.shape[1]) != (first.kind, first.group_size, first.shape[1]) for w in weights
    ):
        raise ConfigError("linear layers that are computed together must be quantised alike")
    zeros = None
    if any(w.zeros is not None for w in weights):
        zeros = torch.cat([_zeros_of(w) for w in weights])
    # A dtype that holds all scales exactly, where they differ.
    dtype = first.scales.dtype if len({w.scales.dtype for w in weights}) == 1 else torch.float32
    return QuantizedTensor(
        first.kind,
        torch.cat([w.values for w in weights]),
        torch.cat([w.scales.to(dtype) for w in weights]),
        zeros,
        first.group_size,
    )


def _zeros_of(weight: QuantizedTensor) -> torch.Tensor:
    if weight.zeros is not None:
        return weight.zeros
    return torch.full_like(weight.scales, ZERO, dtype=torch.uint8)
