"""Rounding weights to the nearest value of the formats that CUDA kernels and quantised checkpoints share.

Four bits: 16 levels, -8 to 7 times a scale, in groups of 128 inputs or per output channel. Eight bits: float8
e4m3 with a scale per output channel. The 4-bit groups of `quantize` (minimum and 16 levels) are another
format, that of GGUF and the CPU.
"""

from __future__ import annotations

import torch

from polybatch.models.quantized_weights import (
    ZERO,
    QuantizedTensor,
    concatenate,
    dequantize_symmetric,
)

__all__ = [
    "FP8_MAX",
    "GROUP_INPUTS",
    "ZERO",
    "QuantizedTensor",
    "concatenate",
    "dequantize_symmetric",
    "quantize_fp8",
    "quantize_int4_symmetric",
]

GROUP_INPUTS = 128
FP8_MAX = 448.0
_TINY = 1e-30


def quantize_int4_symmetric(weight: torch.Tensor, group_size: int | None = GROUP_INPUTS) -> QuantizedTensor:
    """Round weight: [out, in], any float dtype, to the nearest of 16 levels, -8 to 7 times a scale.

    group_size: consecutive inputs per scale, None for one scale per output channel. The scale, a bfloat16,
    is the smallest that clips neither end, and the levels are those of the rounded scale.
    """
    out, inputs = weight.shape
    size = inputs if group_size is None else group_size
    wide = torch.nn.functional.pad(weight.float(), (0, -inputs % size)).view(out, -1, size)
    low, high = wide.aminmax(dim=2)
    scales = torch.maximum(high / 7, -low / 8)
    scales = torch.where(scales > _TINY, scales, 1.0).to(torch.bfloat16)
    levels = torch.round(wide / scales.float()[..., None]).clamp_(-8, 7) + ZERO
    values = levels.to(torch.uint8).view(out, -1)[:, :inputs].contiguous()
    return QuantizedTensor("int4", values, scales, None, size)


def quantize_fp8(weight: torch.Tensor) -> QuantizedTensor:
    """Round weight: [out, in], any float dtype, to e4m3 with a float32 scale per output channel."""
    wide = weight.float()
    scales = wide.abs().amax(dim=1, keepdim=True) / FP8_MAX
    scales = torch.where(scales > _TINY, scales, 1.0)
    values = (wide / scales).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return QuantizedTensor("fp8", values, scales, None, weight.shape[1])
