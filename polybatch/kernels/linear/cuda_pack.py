"""The layout of 4-bit weights that `cuda_int4` reads.

    words   [k_tiles, rows, 64] int16: bits 4 j to 4 j + 3 of words[t, r, c] are the value of row r and
            input 256 t + 64 j + c, plus 8. The rows of a tile lie one behind the other, 128 bytes each,
            so any block of rows is one contiguous stretch of memory, read in 16-byte pieces.
    scales  grouped: [k_tiles + 1, rows] int32, the 16-bit scales of a tile's two groups of 128 inputs, the
            first in the lower half; per channel: [rows] float32
    offsets [k_tiles + 1, rows] int32, 8 - zero of the two groups likewise; None for symmetric weights

Rows are filled up to a multiple of 128 and inputs to one of 256; the spare row of the tables lets the kernel
fetch a tile ahead. Made once at load time, on the device that will use it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polybatch.errors import ConfigError
from polybatch.kernels.linear.quantize_symmetric import GROUP_INPUTS, ZERO, QuantizedTensor

K_TILE = 256
ROW_TILE = 128
PLANE = 64
_SMALLEST_NORMAL_HALF = 2.0**-14
_LARGEST_HALF = 65504.0


@dataclass(frozen=True, slots=True)
class Int4Layout:
    """Packed 4-bit weights of shape [num_out, num_in]; the module's docstring says how."""

    num_out: int
    num_in: int
    words: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    is_grouped: bool
    scales_bf16: bool

    @property
    def rows(self) -> int:
        return self.words.shape[1]

    @property
    def k_tiles(self) -> int:
        return self.words.shape[0]

    @property
    def num_bytes(self) -> int:
        tables = [self.words, self.scales, *([] if self.offsets is None else [self.offsets])]
        return sum(t.numel() * t.element_size() for t in tables)


def pack_int4(weight: QuantizedTensor) -> Int4Layout:
    """Rearrange a 4-bit weight, bit for bit.

    Raises ConfigError for groups that are not whole multiples of 128 inputs, or for a number of inputs that
    is no multiple of 8 (rows of activations must begin at 16-byte boundaries).
    """
    num_out, num_in = weight.shape
    if num_in % 8:
        raise ConfigError(f"a 4-bit linear layer has {num_in} inputs; the CUDA kernel needs a multiple of 8")
    if not weight.is_per_channel and weight.group_size % GROUP_INPUTS:
        raise ConfigError(
            f"4-bit weights have groups of {weight.group_size} inputs; the CUDA kernel knows groups of "
            f"{GROUP_INPUTS} (or a multiple) and one scale per output channel: serve them dequantised "
            "(quantization None)"
        )
    k_tiles = -(-num_in // K_TILE)
    rows = -(-num_out // ROW_TILE) * ROW_TILE
    values = torch.nn.functional.pad(
        weight.values, (0, k_tiles * K_TILE - num_in, 0, rows - num_out), value=ZERO
    )
    planes = values.view(rows, k_tiles, 4, PLANE).permute(2, 1, 0, 3).to(torch.int16)
    words = planes[0] | (planes[1] << 4) | (planes[2] << 8) | (planes[3] << 12)
    is_grouped = not weight.is_per_channel or weight.zeros is not None
    dtype = _scale_type(weight.scales)
    scales_bf16 = dtype == torch.bfloat16
    if is_grouped:
        scales = _pairs(weight.scales.to(dtype), weight.group_size, rows, k_tiles)
    else:
        scales = torch.nn.functional.pad(weight.scales[:, 0].float(), (0, rows - num_out))
    offsets = None
    if weight.zeros is not None:
        offsets = _pairs(ZERO - weight.zeros.to(torch.int16), weight.group_size, rows, k_tiles)
    return Int4Layout(num_out, num_in, words.contiguous(), scales, offsets, is_grouped, scales_bf16)


def holds_exactly(weight: QuantizedTensor) -> bool:
    """Whether packing keeps a 4-bit weight to the last bit: its groups, and scales in 16 bits."""
    num_in = weight.shape[1]
    if num_in % 8 or not (weight.is_per_channel or weight.group_size % GROUP_INPUTS == 0):
        return False
    if weight.is_per_channel and weight.zeros is None:
        return True
    return torch.equal(weight.scales.to(_scale_type(weight.scales)).float(), weight.scales.float())


def _scale_type(scales: torch.Tensor) -> torch.dtype:
    """The 16-bit type that holds all scales best: float16, except where it overflows or loses more bits."""
    wide = scales.float()
    half = wide.half()
    if torch.equal(half.float(), wide):
        return torch.float16
    size = wide.abs()
    is_normal = (size == 0) | ((size >= _SMALLEST_NORMAL_HALF) & (size <= _LARGEST_HALF))
    return torch.float16 if bool(is_normal.all()) else torch.bfloat16


def _pairs(table: torch.Tensor, group_size: int, rows: int, k_tiles: int) -> torch.Tensor:
    """[out, groups] of 16 bits -> [k_tiles + 1, rows] int32, two groups of 128 inputs in each."""
    num_out, groups = table.shape
    # Groups of a multiple of 128 inputs, or of all: repeat their entry.
    repeats = max(1, -(-group_size // GROUP_INPUTS)) if groups == 1 else group_size // GROUP_INPUTS
    fine = table.view(torch.int16).repeat_interleave(repeats, dim=1)[:, : 2 * k_tiles]
    fine = torch.nn.functional.pad(fine, (0, 2 * (k_tiles + 1) - fine.shape[1], 0, rows - num_out))
    return fine.view(rows, k_tiles + 1, 2).transpose(0, 1).contiguous().view(torch.int32).squeeze(2)
