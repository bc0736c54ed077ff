"""Kernels of the carried adapter: B into the weights' spare columns, h into the inputs' spare elements.

See `lora.carried`. h is rounded to the activations' dtype, as the inputs beside it are.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from polybatch.adapters.layout import ALIGN_BYTES
from polybatch.kernels.lora.carried import BLOCK, FIRST_ROW, LAST_ROW, RECORDS, SPARE
from polybatch.kernels.lora.cuda_delta import KEEP
from polybatch.kernels.lora.work import (
    A_WORD,
    ABSENT,
    MODULE,
    MODULE_FIELDS,
    RANK,
    STRIDE,
    TILE_FIELDS,
    GroupShape,
    Int32Array,
)

_BLOCK = tl.constexpr(BLOCK)
_FIRST_ROW, _LAST_ROW = tl.constexpr(FIRST_ROW), tl.constexpr(LAST_ROW)
_RANK, _STRIDE, _A_WORD = tl.constexpr(RANK), tl.constexpr(STRIDE), tl.constexpr(A_WORD)
_MODULE, _MODULE_FIELDS, _ABSENT = tl.constexpr(MODULE), tl.constexpr(MODULE_FIELDS), tl.constexpr(ABSENT)


@dataclass(frozen=True, slots=True)
class Blocking:
    """How `shrink_carried_kernel` is compiled. columns: of a turn, split between so many warps."""

    tokens: int
    columns: int
    split: int
    num_warps: int
    num_stages: int


# Up to so many rows; chosen by benchmarks/cuda/carried.py on an H100.
BLOCKINGS = (
    (512, Blocking(16, 256, 4, 4, 4)),
    (2048, Blocking(32, 256, 4, 4, 4)),
    (1 << 30, Blocking(64, 64, 1, 4, 4)),
)
# float32, whose columns are twice as wide.
EXACT_BLOCKINGS = ((512, Blocking(16, 64, 1, 2, 3)), (1 << 30, Blocking(32, 32, 1, 4, 3)))
# From so many rows on, silu_mul leaves h of down, if that has so few rows of A.
SILU_ROWS, SILU_RANK = 2049, BLOCK
# Tokens and columns of a turn, warps, stages.
SILU_TILES = (128, 64, 8, 3)
# Outputs of a program that places B.
PLACE_OUTS = 128


class Carrier:
    """Weights of one model with spare columns, and the adapter that stands in them.

    weights: per layer and group, [out, in + SPARE], all of one dtype on one device. shapes: of the groups.
    pages: [layers, elements], the pool in that dtype; words: from `CudaAdapters`.
    """

    def __init__(
        self,
        weights: Sequence[Sequence[torch.Tensor]],
        shapes: Sequence[GroupShape],
        pages: torch.Tensor,
        words: torch.Tensor,
    ) -> None:
        self._weights = weights
        self._shapes, self._pages, self._words = shapes, pages, words
        addresses = [[layer[group].data_ptr() for layer in weights] for group in range(len(shapes))]
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=pages.device)
        self._unit = ALIGN_BYTES // pages.element_size()
        self._is_exact = pages.dtype == torch.float32
        self.held: object = None
        """Key of the adapter in the columns; None where they hold none, or may hold parts of two."""
        self._down_rank = 0

    def take(self, key: object, template: Int32Array, on: torch.Tensor) -> None:
        """Have the adapter of this key in the columns, in the order of the current stream; nothing if it is.

        template: its row of `CudaAdapters.templates`. on: `lora_carried` on the device, filled with it for a
        step of the adapter, whose pages are loaded.
        """
        if key == self.held:
            return
        self.held = None
        for group, shape in enumerate(self._shapes):
            outs = (*shape.outs, 0, 0)
            grid = (len(self._weights), triton.cdiv(sum(outs), PLACE_OUTS))
            place_kernel[grid](
                self._addresses[group], shape.num_in + SPARE[group], self._pages, self._pages.stride(0),
                self._words, _record(on, group), shape.num_in, *outs[:3],
                COLUMNS=SPARE[group], UNIT=self._unit, BLOCK_N=PLACE_OUTS,
                LARGEST=torch.finfo(self._pages.dtype).max, num_warps=4,
            )  # fmt: skip
        self.held, self._down_rank = key, int(template[-1, RANK])

    def rehearse(self, inputs: Sequence[torch.Tensor], gate_up: torch.Tensor, on: torch.Tensor) -> None:
        """Launch everything, no adapter being there. inputs: per group, as `shrink` takes; on: zeros."""
        most = len(gate_up)
        self.take("", np.zeros((len(inputs), TILE_FIELDS), np.int32), on)
        for group, x in enumerate(inputs):
            for num_rows in {min(rows, most) for rows, _ in BLOCKINGS}:
                self.shrink(group, 0, x[:num_rows], on)
        if self.takes_silu(most):
            self.silu_mul(0, gate_up, inputs[-1], on)

    def shrink(self, group: int, layer: int, x: torch.Tensor, on: torch.Tensor) -> None:
        """Write h into the last SPARE elements of x's rows: 0 in rows that are not the adapter's.

        x: [T, in + SPARE], of one group's products in one layer.
        """
        shape, num_rows = self._shapes[group], len(x)
        blockings = EXACT_BLOCKINGS if self._is_exact else BLOCKINGS
        blocking = next(blocking for most, blocking in blockings if num_rows <= most)
        grid = (SPARE[group] // BLOCK, triton.cdiv(num_rows, blocking.tokens))
        shrink_carried_kernel[grid](
            x, x.stride(0), self._pages[layer], self._words, on, _record(on, group), layer, num_rows,
            shape.num_in, UNIT=self._unit, BLOCK_T=blocking.tokens, BLOCK_K=blocking.columns,
            SPLIT=blocking.split, STAGES=blocking.num_stages, EXACT=self._is_exact,
            num_warps=blocking.num_warps,
        )  # fmt: skip

    def takes_silu(self, num_rows: int) -> bool:
        """Whether `silu_mul` is for a step of so many rows and the adapter in the columns now."""
        return num_rows >= SILU_ROWS and self._down_rank <= SILU_RANK and not self._is_exact

    def silu_mul(self, layer: int, gate_up: torch.Tensor, out: torch.Tensor, on: torch.Tensor) -> None:
        """`activation.cuda.silu_mul`, and h of down as `shrink` leaves it, while what it reads is at hand.

        gate_up: [T, 2 N]. out: [T, N + SPARE].
        """
        tokens, columns, num_warps, num_stages = SILU_TILES
        group = len(self._shapes) - 1
        width = self._shapes[group].num_in
        grid = (SPARE[group] // BLOCK, triton.cdiv(len(out), tokens))
        silu_mul_carried_kernel[grid](
            gate_up, gate_up.stride(0), out, out.stride(0), self._pages[layer], self._words, on,
            _record(on, group), layer, len(out), WIDTH=width, UNIT=self._unit, BLOCK_T=tokens,
            BLOCK_K=columns, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip


def _record(on: torch.Tensor, group: int) -> torch.Tensor:
    return on[RECORDS + group * TILE_FIELDS :]


@triton.jit
def _parts(rank, most):
    """Blocks of columns that one copy of B takes, and how many copies there are in `most` blocks."""
    num_blocks = tl.maximum(tl.cdiv(rank, _BLOCK), 1)
    return num_blocks, most // num_blocks


@triton.jit(do_not_specialize_on_alignment=["record"])
def place_kernel(
    addresses, stride, pages, layer_stride, words, record, num_in, out_0, out_1, out_2,
    COLUMNS: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Grid: layers, blocks of a group's outputs, whose spare columns are written, 0 where B has none.

    A number beyond the dtype's becomes its largest: infinity times 0 would spoil rows without the adapter.
    """
    layer = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, COLUMNS)
    num_blocks, num_parts = _parts(tl.load(record + _RANK), COLUMNS // _BLOCK)
    row = tl.where(column < num_parts * num_blocks * _BLOCK, column % (num_blocks * _BLOCK), -1)
    memory = pages + layer.to(tl.int64) * layer_stride
    word = words + layer * tl.load(record + _STRIDE)
    kind = pages.dtype.element_ty
    b = tl.zeros([COLUMNS, BLOCK_N], kind)
    b = _module_b(b, 0, n, out_0, row, record, word, memory, UNIT)
    b = _module_b(b, 1, n - out_0, out_1, row, record, word, memory, UNIT)
    b = _module_b(b, 2, n - out_0 - out_1, out_2, row, record, word, memory, UNIT)
    limit = tl.full([1, 1], LARGEST, tl.float32)
    b = tl.minimum(tl.maximum(b.to(tl.float32), -limit), limit).to(kind)
    weight = tl.multiple_of(tl.load(addresses + layer).to(tl.pointer_type(kind)), 16)
    target = weight + n.to(tl.int64)[:, None] * stride + num_in + column[None, :]
    tl.store(target, tl.trans(b), mask=(n < out_0 + out_1 + out_2)[:, None])


@triton.jit
def _module_b(
    b, module: tl.constexpr, n, width, row, record, word, memory, UNIT: tl.constexpr
):  # fmt: skip
    """b with what a module has in its outputs n. row: of the group's A that stands in each column, or -1."""
    of_module = record + _MODULE + _MODULE_FIELDS * module
    b_word, rank, first = tl.load(of_module), tl.load(of_module + 1), tl.load(of_module + 2)
    own = (row >= first) & (row < first + rank) & (b_word != _ABSENT)
    # Before rows of B, a module's words have those of gain and bias.
    start = tl.load(word + b_word + 2 + row - first, mask=own, other=-1)
    here = (start >= 0)[:, None] & ((n >= 0) & (n < width))[None, :]
    found = tl.load(memory + start.to(tl.int64)[:, None] * UNIT + n[None, :], mask=here, other=0.0)
    return tl.where(here, found, b)


@triton.jit(do_not_specialize=["layer", "num_rows"], do_not_specialize_on_alignment=["on", "record"])
def shrink_carried_kernel(
    x, x_stride, memory, words, on, record, layer, num_rows, num_in,
    UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of columns, tiles of tokens."""
    first_row, last_row = tl.load(on + _FIRST_ROW), tl.load(on + _LAST_ROW)
    rank = tl.load(record + _RANK, eviction_policy=KEEP)
    word = tl.load(record + _A_WORD, eviction_policy=KEEP) + layer * tl.load(record + _STRIDE)
    num_blocks, num_parts = _parts(rank, tl.num_programs(0))
    block = tl.program_id(0)
    part = block // num_blocks
    row = (block % num_blocks) * _BLOCK + tl.arange(0, _BLOCK)
    low_token = tl.program_id(1) * BLOCK_T
    t = low_token + tl.arange(0, BLOCK_T)
    own = (t >= first_row) & (t < last_row)
    is_there = (row < rank) & (part < num_parts)
    start = tl.load(words + word + row, mask=is_there, other=-1, eviction_policy=KEEP)
    is_row = start >= 0
    x_rows = x + t.to(tl.int64) * x_stride
    rows = memory + start.to(tl.int64) * UNIT
    per_part = tl.cdiv(tl.cdiv(num_in, num_parts), BLOCK_K) * BLOCK_K
    is_any = (low_token < last_row) & (low_token + BLOCK_T > first_row) & (part < num_parts)
    low = tl.where(is_any, part * per_part, 0)
    high = tl.where(is_any, tl.minimum(low + per_part, num_in), 0)
    if SPLIT == 1:
        k = tl.arange(0, BLOCK_K)
        total = tl.zeros([BLOCK_T, _BLOCK], dtype=tl.float32)
        for at in tl.range(low, high, BLOCK_K, num_stages=STAGES):
            is_column = at + k < num_in
            here = tl.load(x_rows[:, None] + at + k[None, :],
                           mask=own[:, None] & is_column[None, :], other=0.0)  # fmt: skip
            a = tl.load(rows[None, :] + at + k[:, None],
                        mask=is_row[None, :] & is_column[:, None], other=0.0)  # fmt: skip
            total = tl.dot(here, a, total, input_precision="ieee" if EXACT else "tf32")
    else:
        # Each warp has columns of its own: one sum after the other would be a chain of waits.
        width: tl.constexpr = BLOCK_K // SPLIT
        k = tl.arange(0, SPLIT)[:, None] * width + tl.arange(0, width)[None, :]
        sums = tl.zeros([SPLIT, BLOCK_T, _BLOCK], dtype=tl.float32)
        for at in tl.range(low, high, BLOCK_K, num_stages=STAGES):
            is_column = at + k < num_in
            here = tl.load(x_rows[None, :, None] + at + k[:, None, :],
                           mask=own[None, :, None] & is_column[:, None, :], other=0.0)  # fmt: skip
            a = tl.load(rows[None, None, :] + at + k[:, :, None],
                        mask=is_row[None, None, :] & is_column[:, :, None], other=0.0)  # fmt: skip
            sums = tl.dot(here, a, sums, input_precision="ieee" if EXACT else "tf32")
        total = tl.sum(sums, axis=0)
    # A row that this layer lacks is 0 even where x is infinite.
    total = tl.where(own[:, None] & is_row[None, :], total, 0.0)
    target = x_rows[:, None] + num_in + block * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    tl.store(target, total.to(x.dtype.element_ty), mask=(t < num_rows)[:, None])


@triton.jit(do_not_specialize=["layer", "num_rows"], do_not_specialize_on_alignment=["on", "record"])
def silu_mul_carried_kernel(
    gate_up, stride, out, out_stride, memory, words, on, record, layer, num_rows,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: parts of the columns, as many as B has copies if its rank is within BLOCK; tiles of tokens."""
    first_row, last_row = tl.load(on + _FIRST_ROW), tl.load(on + _LAST_ROW)
    rank = tl.load(record + _RANK)
    word = words + tl.load(record + _A_WORD) + layer * tl.load(record + _STRIDE)
    part, num_parts = tl.program_id(0), tl.num_programs(0)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token, own = t < num_rows, (t >= first_row) & (t < last_row)
    row = tl.arange(0, _BLOCK)
    start = tl.load(word + row, mask=row < rank, other=-1)
    rows = memory + start.to(tl.int64) * UNIT
    gate_rows = gate_up + t.to(tl.int64)[:, None] * stride
    out_rows = out + t.to(tl.int64)[:, None] * out_stride
    per_part = tl.cdiv(tl.cdiv(WIDTH, num_parts), BLOCK_K) * BLOCK_K
    low = part * per_part
    kind = out.dtype.element_ty
    total = tl.zeros([BLOCK_T, _BLOCK], dtype=tl.float32)
    for at in tl.range(low, tl.minimum(low + per_part, WIDTH), BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        mask = is_token[:, None] & (k < WIDTH)[None, :]
        gate = tl.load(gate_rows + k[None, :], mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_rows + WIDTH + k[None, :], mask=mask, other=0.0).to(tl.float32)
        a = tl.load(rows[None, :] + k[:, None], mask=(start >= 0)[None, :] & (k < WIDTH)[:, None], other=0.0)
        silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
        done = (silu * up).to(kind)
        tl.store(out_rows + k[None, :], done, mask=mask)
        total = tl.dot(done, a, total)
    total = tl.where(own[:, None] & (start >= 0)[None, :], total, 0.0)
    target = out_rows + WIDTH + part * _BLOCK + row[None, :]
    tl.store(target, total.to(kind), mask=is_token[:, None])


__all__ = ["Carrier", "place_kernel", "shrink_carried_kernel", "silu_mul_carried_kernel"]
