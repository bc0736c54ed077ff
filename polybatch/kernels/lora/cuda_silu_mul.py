"""silu_mul over y + B h for CUDA: gate and up get their adapters on the way into the activation.

Rows of decode steps and short chunks are one to LEAD_ROWS to a program where few share an adapter, and tiles
for the matrix unit where many do, as long chunks are. A row without adapter costs what it costs in
`activation.cuda`. y + B h is rounded to the dtype, as if it had been written and read.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from polybatch.kernels.lora.cuda_delta import (
    RECORD_FIRST,
    RECORD_NUM_TOKENS,
    RECORD_PARTS,
    TILE_STRIDE,
    add_product,
    add_remainder,
    add_rows,
    find_module,
    load_b,
    load_h,
    load_starts,
)


@triton.jit(do_not_specialize=["layer", "max_rows"], do_not_specialize_on_alignment=["rows"])
def silu_mul_rows(
    gate_up, stride, out, out_stride, rows, max_rows, tiles, h, memory, words, layer,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, LEAD: tl.constexpr, RANK_ONE: tl.constexpr,
    RANK_FEW: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: rows, blocks of columns. The first LEAD rows of a dense tile share its block's columns."""
    row = tl.program_id(0)
    count = tl.load(rows + row)
    tile = tl.load(rows + max_rows + row)
    token = tl.load(rows + 2 * max_rows + row)
    is_dense = tl.load(rows + 3 * max_rows + row)
    if is_dense:
        if token < LEAD:
            first = row - token
            _tile(gate_up + first.to(tl.int64) * stride, stride, out + first.to(tl.int64) * out_stride,
                  out_stride, 0, tiles + tile * TILE_STRIDE, tl.program_id(1) * LEAD + token, h, memory,
                  words, layer, WIDTH, BLOCK // LEAD, 1, UNIT, BLOCK_T, BLOCK_R, True, EXACT)  # fmt: skip
    elif count == 1:
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
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, IS_LONG: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: NUM_BLOCKS blocks of columns each, wide tiles."""
    record = tiles + (tl.load(bounds + 2) + tl.program_id(1)) * TILE_STRIDE
    first = tl.load(record + RECORD_FIRST)
    _tile(gate_up, stride, out, out_stride, first, record, tl.program_id(0) * NUM_BLOCKS, h, memory, words,
          layer, WIDTH, BLOCK, NUM_BLOCKS, UNIT, BLOCK_T, BLOCK_R, IS_LONG, EXACT)  # fmt: skip


@triton.jit
def _tile(
    gate_up, stride, out, out_stride, first, record, first_block, h, memory, words, layer,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, IS_LONG: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Some blocks of columns of a tile, whose rows begin at `first`. Its h stays from block to block."""
    kind = out.dtype.element_ty
    t = tl.arange(0, BLOCK_T)
    is_token = t < tl.load(record + RECORD_NUM_TOKENS)
    at = (first + t).to(tl.int64)[:, None]
    num_parts = tl.load(record + RECORD_PARTS)
    word_0, rank_0, is_there_0, h_0, part_0 = find_module(record, t, 0, h, words, layer)
    word_1, rank_1, is_there_1, h_1, part_1 = find_module(record, t, 1, h, words, layer)
    start_0, start_1 = load_starts(word_0, rank_0, 0, BLOCK_R), load_starts(word_1, rank_1, 0, BLOCK_R)
    value_0 = load_h(h_0, part_0, num_parts, is_token, rank_0, 0, BLOCK_R)
    value_1 = load_h(h_1, part_1, num_parts, is_token, rank_1, 0, BLOCK_R)
    for block in range(NUM_BLOCKS):
        n = (first_block + block) * BLOCK + tl.arange(0, BLOCK)
        is_column = n < WIDTH
        mask = is_token[:, None] & is_column[None, :]
        gate = tl.load(gate_up + at * stride + n[None, :], mask=mask, other=0.0)
        up = tl.load(gate_up + at * stride + WIDTH + n[None, :], mask=mask, other=0.0)
        b_0 = load_b(start_0, n, is_column, memory, UNIT)
        b_1 = load_b(start_1, n, is_column, memory, UNIT)
        gate = add_product(gate.to(tl.float32), value_0, b_0, EXACT)
        gate = add_remainder(gate, word_0, rank_0, is_there_0, h_0, part_0, num_parts, is_token, n, is_column,
                             memory, UNIT, BLOCK_R, IS_LONG, EXACT)  # fmt: skip
        up = add_product(up.to(tl.float32), value_1, b_1, EXACT)
        up = add_remainder(up, word_1, rank_1, is_there_1, h_1, part_1, num_parts, is_token, n, is_column,
                           memory, UNIT, BLOCK_R, IS_LONG, EXACT)  # fmt: skip
        gate, up = gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
        tl.store(out + at * out_stride + n[None, :], (silu * up).to(kind), mask=mask)
