"""Dequantise rows of GGUF blocks to float32.

The three common types are written out in torch, two to three times as fast as the `gguf` package's
numpy, because a small model spends most of its start here; the results are the same to the last bit.
All others go through the package.
Source: ggml's block layouts; a scale (and a minimum) in float16, then 32 values. Four-bit values i
and i + 16 share a byte.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize


def dequantise_blocks(rows: torch.Tensor, type_name: str) -> torch.Tensor:
    """float32 values [num_rows, values of a row] of uint8 rows [num_rows, bytes of a row]."""
    fast = _FAST.get(type_name)
    if fast is not None:
        return fast(rows).reshape(len(rows), -1)
    return torch.from_numpy(dequantize(rows.numpy(), GGMLQuantizationType[type_name]))


def _scales(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """The float16 numbers at the head of each block, [num_blocks, count] float32."""
    return blocks[:, : 2 * count].contiguous().view(torch.float16).float()


def _q8_0(rows: torch.Tensor) -> torch.Tensor:
    blocks = rows.view(-1, 34)
    return torch.mul(blocks[:, 2:].view(torch.int8), _scales(blocks, 1))


def _q4_0(rows: torch.Tensor) -> torch.Tensor:
    blocks = rows.view(-1, 18)
    scale, packed = _scales(blocks, 1), blocks[:, 2:]
    values = torch.empty(len(blocks), 2, 16)
    torch.mul((packed & 15).view(torch.int8) - 8, scale, out=values[:, 0])
    torch.mul((packed >> 4).view(torch.int8) - 8, scale, out=values[:, 1])
    return values


def _q4_1(rows: torch.Tensor) -> torch.Tensor:
    blocks = rows.view(-1, 20)
    scales, packed = _scales(blocks, 2), blocks[:, 4:]
    scale, minimum = scales[:, :1], scales[:, 1:]
    values = torch.empty(len(blocks), 2, 16)
    torch.mul(packed & 15, scale, out=values[:, 0])
    torch.mul(packed >> 4, scale, out=values[:, 1])
    # Not one fused multiply-add, which rounds once where the original rounds twice.
    values += minimum[:, :, None]
    return values


_FAST: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1}
