"""Rounding weights and activations to 8 and 4 bits; shared by the reference and the fast variants.

Ties round to even everywhere. Nothing here is packed: one value takes one byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polybatch.errors import ConfigError

INT8_MAX = 127
INT4_LEVELS = 16
SMALLEST = 1e-30
GROUP = 32
"""Consecutive inputs that share a scale: of activations always, of weights in int4."""


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """values: [out, in] int8, -127 to 127; scales: [out] float32. W ~ values * scales[:, None]."""

    values: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """Groups of `in / num_groups` consecutive inputs: W ~ values * scale + min of the group.

    values: [out, in] uint8, 0 to 15; scales, mins: [out, num_groups] float32.
    """

    values: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor

    @property
    def group(self) -> int:
        return self.values.shape[1] // self.scales.shape[1]


def quantize_int8(weight: torch.Tensor) -> Int8Weight:
    """Round weight: [out, in], any float dtype, to 8 bits; an output channel of zeros stays zero."""
    wide = weight.float()
    mins, maxs = wide.aminmax(dim=1)
    scales = torch.maximum(maxs, -mins) / INT8_MAX
    values = (wide / _divisor(scales)[:, None]).round_().to(torch.int8)
    return Int8Weight(values, scales)


def quantize_int4(weight: torch.Tensor, group: int = GROUP) -> Int4Weight:
    """Round weight: [out, in], any float dtype, to 16 levels from minimum to maximum of each group.

    Weights that already lie on 16 even levels of which each group uses both ends are recovered, but for
    the rounding of float32. Raises ConfigError unless `in` is a multiple of the group.
    """
    num_in = weight.shape[1]
    if num_in % group:
        raise ConfigError(
            f"quantization 'int4' works on groups of {group} inputs, but a linear layer has {num_in}: "
            "use quantization 'int8' or none"
        )
    grouped = weight.float().reshape(weight.shape[0], -1, group)
    mins, maxs = grouped.aminmax(dim=2)
    scales = (maxs - mins) / (INT4_LEVELS - 1)
    levels = (grouped - mins[..., None]).div_(_divisor(scales)[..., None])
    values = levels.round_().clamp_(0, INT4_LEVELS - 1).to(torch.uint8).flatten(1)
    return Int4Weight(values, scales, mins)


def dequantize(weight: Int8Weight | Int4Weight) -> torch.Tensor:
    """The weight that the integers stand for, [out, in] float32."""
    if isinstance(weight, Int8Weight):
        return weight.values.float() * weight.scales[:, None]
    grouped = weight.values.float().reshape(weight.values.shape[0], -1, weight.group)
    return (grouped * weight.scales[..., None] + weight.mins[..., None]).flatten(1)


def quantize_activations(x: torch.Tensor, group: int = GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row of x: [T, in] to int8 in groups of inputs, the last group filled up with zeros.

    A group is multiplied by 127 / max|x| in float32, then rounded; its scale is max|x| / 127.
    Returns (values [T, padded in] int8, scales [T, groups] float32).
    """
    wide = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % group))
    grouped = wide.reshape(x.shape[0], wide.shape[1] // group, group)
    largest = grouped.abs().amax(dim=2)
    values = torch.round(grouped * (INT8_MAX / _divisor(largest))[..., None]).to(torch.int8)
    return values.flatten(1), largest / INT8_MAX


def _divisor(scales: torch.Tensor) -> torch.Tensor:
    """The scales, with 1 for those that are 0 or too small to divide by without overflow."""
    return torch.where(scales > SMALLEST, scales, 1.0)
