"""Weights of a compiled linear layer, packed for its kernel: panels of 64 output columns.

A panel holds its columns' weights in the order in which the kernel reads them: a 32-bit lane per
column, 64 columns side by side, then the next 1, 2 or 4 inputs (float32, bfloat16, int8). Panels of int4
weights go group by group, each with its nibbles, scales and minima.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from polybatch.errors import EngineError
from polybatch.kernels.cpu.layout import COLUMNS, padded
from polybatch.kernels.cpu.memory import aligned_bytes
from polybatch.kernels.linear.quantize import GROUP, Int4Weight, quantize_int4, quantize_int8

INTEGER_KINDS = ("int8", "int4")
FLOAT_INPUTS = 4
"""Inputs of a float weight are filled up with zeros to a multiple of this."""
# A panel's record (int64): column in the output buffer, then two halves (module index or -1, first
# row of the module's weight, valid rows, address of the base bias or 0). Only SILU_MUL uses two.
PANEL_FIELDS = 9


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix [out, in] on its way into `pack`, its adapter module index and its bias [out]."""

    matrix: torch.Tensor
    module: int = -1
    bias: torch.Tensor | None = None


INT4_GROUP_BYTES = COLUMNS * GROUP // 2 + 2 * COLUMNS * 2
"""A group of a panel of int4 weights: nibbles, then float16 scales and minima."""
PANEL_COLUMN_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "int8": 1.0,
    "int4": INT4_GROUP_BYTES / COLUMNS / GROUP,
}
"""Bytes per weight as packed."""
SLICE_ROWS = 4096
"""Output rows packed at a time; a multiple of a panel's columns."""


@dataclass(slots=True)
class PackedLinear:
    """A weight matrix (or several stacked along `out`) in panels, with what its kernel needs beside.

    data: uint8, 64-byte aligned. in_size: inputs, padded to the kernel's step. records: int64
    [panels, PANEL_FIELDS]. scales: per padded output column, int8 only. keep: tensors whose
    memory the records point to.
    """

    kind: str
    in_size: int
    num_panels: int
    panel_bytes: int
    data: torch.Tensor
    records: np.ndarray[Any, np.dtype[np.int64]]
    scales: torch.Tensor | None = None
    keep: list[torch.Tensor] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.data.numel()


def _whole_inputs(matrix: torch.Tensor, multiple: int = FLOAT_INPUTS) -> torch.Tensor:
    """[out, in] with its inputs filled up with zeros, so that the kernel's last step reads no other panel."""
    missing = -matrix.shape[1] % multiple
    return torch.nn.functional.pad(matrix, (0, missing)) if missing else matrix


def _panels_of(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """[out, in] -> [panels, columns, in], zero-padded."""
    out, inputs = weight.shape
    missing = -out % columns
    full = torch.nn.functional.pad(weight, (0, 0, 0, missing)) if missing else weight
    return full.contiguous().view(-1, columns, inputs)


def _pack_int4(q: Int4Weight, columns: int) -> torch.Tensor:
    """Panels of [groups, (4 x columns x 4 bytes of nibble pairs, scales, minima)] as uint8.

    Byte b of a lane in vector v holds input 8 v + b in its low and 8 v + 4 + b in its high nibble.
    """
    values = _panels_of(q.values, columns)
    count, _, inputs = values.shape
    groups = inputs // GROUP
    lanes = values.view(count, columns, groups, 4, 2, 4).permute(0, 2, 3, 1, 4, 5)
    nibbles = (lanes[..., 0, :] | (lanes[..., 1, :] << 4)).reshape(count, groups, -1)
    parts = [nibbles]
    for table in (q.scales, q.mins):
        halves = _panels_of(table.to(torch.float16), columns).transpose(1, 2).contiguous()
        parts.append(halves.view(torch.uint8).reshape(count, groups, -1))
    return torch.cat(parts, dim=2)


def pack(
    weights: list[Weight],
    kind: str,
    interleave_halves: bool = False,
    allocate: Callable[[int], torch.Tensor] = aligned_bytes,
) -> PackedLinear:
    """Pack matrices that share their input, stacked along the output.

    weights: each with its module index for adapters (-1: none) and its bias. With
    `interleave_halves` there are two of equal shape, gate and up, and a panel holds 32 columns of each.
    allocate: gives so many zeroed bytes, aligned and with slack behind as `aligned_bytes` does.
    Output columns of every matrix start at a multiple of 64 (of 32 in the fused case). Works slice by
    slice, so that packing a vocabulary takes little more memory than its result.
    """
    if kind not in PANEL_COLUMN_BYTES:
        raise EngineError(f"no kernel for weights of kind {kind!r}")
    width = COLUMNS // 2 if interleave_halves else COLUMNS
    in_size = padded(weights[0].matrix.shape[1], GROUP if kind in INTEGER_KINDS else FLOAT_INPUTS)
    panel_bytes = int(COLUMNS * in_size * PANEL_COLUMN_BYTES[kind])
    records, keep = _records(weights, width)
    if interleave_halves:
        gate, up = records[: len(records) // 2], records[len(records) // 2 :]
        rows = [g + u[1:] for g, u in zip(gate, up, strict=True)]
    else:
        rows = [[*r, -1, 0, 0, 0] for r in records]
    packed = allocate(panel_bytes * len(rows))
    panels = packed.view(len(rows), panel_bytes)
    scales: list[torch.Tensor] = []
    at = 0
    for stacked in [weights] if interleave_halves else [[w] for w in weights]:
        for first in range(0, stacked[0].matrix.shape[0], SLICE_ROWS):
            parts = [w.matrix[first : first + SLICE_ROWS] for w in stacked]
            count = padded(parts[0].shape[0], width) // width
            columns = _pack_slice(parts, panels[at : at + count], kind, width)
            at += count
            if kind == "int8":
                scales.append(columns)
    return PackedLinear(
        kind=kind,
        in_size=in_size,
        num_panels=len(rows),
        panel_bytes=panel_bytes,
        data=packed,
        records=np.asarray(rows, dtype=np.int64),
        scales=torch.cat(scales).contiguous() if scales else None,
        keep=keep,
    )


def _records(weights: list[Weight], width: int) -> tuple[list[list[int]], list[torch.Tensor]]:
    """(column, module, first row, valid rows, bias address) of every panel half; tensors to keep alive."""
    records: list[list[int]] = []
    keep: list[torch.Tensor] = []
    column = 0
    for w in weights:
        bias = 0
        if w.bias is not None:
            padded_bias = torch.zeros(padded(w.bias.numel()), dtype=torch.float32)
            padded_bias[: w.bias.numel()] = w.bias.float()
            keep.append(padded_bias)
            bias = padded_bias.data_ptr()
        out = w.matrix.shape[0]
        for first in range(0, padded(out, width), width):
            at_bias = bias + 4 * first if bias else 0
            records.append([column + first, w.module, first, min(width, out - first), at_bias])
        column += padded(out, width)
    return records, keep


def _pack_slice(parts: list[torch.Tensor], panels: torch.Tensor, kind: str, width: int) -> torch.Tensor:
    """Fill panels, uint8 [panels, bytes], from the same rows of one matrix or of gate and up.

    Returns the scales of the panels' columns (int8), or nothing.
    """
    if kind == "int4":
        blobs = [_pack_int4(quantize_int4(part, GROUP), width) for part in parts]
        panels.copy_(_interleave_int4(blobs).flatten(1))
        return torch.empty(0)
    # A lane of a column is 32 bits: 1, 2 or 4 inputs. Packing is a transposition of lanes.
    lanes = panels.view(torch.int32).view(panels.shape[0], -1, width * len(parts))
    scales = []
    for i, part in enumerate(parts):
        if kind == "int8":
            q8 = quantize_int8(part)
            values = _whole_inputs(q8.values.view(torch.uint8) ^ 128, GROUP)  # value + 128 in eight bits
            scales.append(_panels_of(q8.scales.view(-1, 1).float(), width))
        else:
            values = _whole_inputs(part.to(torch.bfloat16 if kind == "bfloat16" else torch.float32))
        columns = _panels_of(values, width).view(torch.int32)
        lanes[:, :, i * width : (i + 1) * width].copy_(columns.transpose(1, 2))
    return torch.cat(scales, dim=1).reshape(-1) if scales else torch.empty(0)


def _interleave_int4(parts: list[torch.Tensor]) -> torch.Tensor:
    """Put 32 columns of gate and 32 of up side by side in every panel; one part stays as it is."""
    if len(parts) == 1:
        return parts[0]
    halves = []
    for part in parts:  # [panels, groups, 4 * 32 * 4 + 2 * 32 * 2]
        count, groups, _ = part.shape
        nibbles = part[:, :, : 16 * 32].view(count, groups, 4, 32 * 4)
        tables = part[:, :, 16 * 32 :].view(count, groups, 2, 32 * 2)
        halves.append((nibbles, tables))
    nibbles = torch.cat([h[0] for h in halves], dim=3).flatten(2)
    tables = torch.cat([h[1] for h in halves], dim=3).flatten(2)
    return torch.cat([nibbles, tables], dim=2)
