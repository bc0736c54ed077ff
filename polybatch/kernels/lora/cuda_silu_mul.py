"""silu_mul over y + B h for CUDA: gate and up get their adapters on the way into the activation.

Rows of decode steps and short chunks are one to LEAD_ROWS to a program, long chunks tiles for the matrix
unit. A row without adapter costs what it costs in `activation.cuda`. y + B h is rounded to the dtype, as if
it had been written and read.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from polybatch.kernels.lora.cuda_delta import (
    RECORD_FIRST,
    RECORD_NUM_TOKENS,
    TILE_STRIDE,
    add_rows,
    add_tile,
)


@triton.jit(do_not_specialize=["layer", "max_rows"], do_not_specialize_on_alignment=["rows"])
def silu_mul_rows(
    gate_up, stride, out, out_stride, rows, max_rows, tiles, h, memory, words, layer,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, LEAD: tl.constexpr, RANK_ONE: tl.constexpr,
    RANK_FEW: tl.constexpr,
):  # fmt: skip
    """Grid: rows, blocks of columns."""
    row = tl.program_id(0)
    count = tl.load(rows + row)
    tile = tl.load(rows + max_rows + row)
    token = tl.load(rows + 2 * max_rows + row)
    if count == 1:
        _few_rows(gate_up, stride, out, out_stride, row, count, tile, token, tiles, h, memory, words, layer,
                  WIDTH, BLOCK, UNIT, 1, RANK_ONE)  # fmt: skip
    elif count > 1:
        _few_rows(gate_up, stride, out, out_stride, row, count, tile, token, tiles, h, memory, words, layer,
                  WIDTH, BLOCK, UNIT, LEAD, RANK_FEW)  # fmt: skip


@triton.jit
def _few_rows(
    gate_up, stride, out, out_stride, row, count, tile, token, tiles, h, memory, words, layer,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    kind = out.dtype.element_ty
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    t = tl.arange(0, BLOCK_T)
    is_column = n < WIDTH
    mask = (t < count)[:, None] & is_column[None, :]
    at = (row + t).to(tl.int64)[:, None]
    gate = tl.load(gate_up + at * stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at * stride + WIDTH + n[None, :], mask=mask, other=0.0).to(tl.float32)
    if tile >= 0:
        record = tiles + tile * TILE_STRIDE
        gate = add_rows(gate, token, count, record, n, is_column, h, memory, words, layer,
                        0, UNIT, BLOCK_T, BLOCK_R, BLOCK)  # fmt: skip
        up = add_rows(up, token, count, record, n, is_column, h, memory, words, layer,
                      1, UNIT, BLOCK_T, BLOCK_R, BLOCK)  # fmt: skip
        gate, up = gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(out + at * out_stride + n[None, :], (silu * up).to(kind), mask=mask)


@triton.jit(do_not_specialize=["layer"])
def silu_mul_tiles(
    gate_up, stride, out, out_stride, bounds, tiles, h, memory, words, layer,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: NUM_BLOCKS blocks of columns each, wide tiles."""
    kind = out.dtype.element_ty
    record = tiles + (tl.load(bounds + 2) + tl.program_id(1)) * TILE_STRIDE
    t = tl.arange(0, BLOCK_T)
    is_token = t < tl.load(record + RECORD_NUM_TOKENS)
    at = (tl.load(record + RECORD_FIRST) + t).to(tl.int64)[:, None]
    for block in range(NUM_BLOCKS):
        n = (tl.program_id(0) * NUM_BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        is_column = n < WIDTH
        mask = is_token[:, None] & is_column[None, :]
        gate = tl.load(gate_up + at * stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + at * stride + WIDTH + n[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = add_tile(gate, t, is_token, record, n, is_column, h, memory, words, layer,
                        0, UNIT, BLOCK_R, EXACT)  # fmt: skip
        up = add_tile(up, t, is_token, record, n, is_column, h, memory, words, layer,
                      1, UNIT, BLOCK_R, EXACT)  # fmt: skip
        gate, up = gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
        tl.store(out + at * out_stride + n[None, :], (silu * up).to(kind), mask=mask)
