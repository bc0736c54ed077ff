"""silu_mul over y + B h for CUDA: gate and up get their adapters on the way into the activation.

Rows of decode steps and short chunks are one to LEAD_ROWS to a program where few share an adapter, and tiles
for the matrix unit where many do, as long chunks are. A row without adapter costs what it costs in
`activation.cuda`. y + B h is rounded to the dtype, as if it had been written and read.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from polybatch.kernels.lora.cuda_delta import (
    RECORD_FIRST,
    RECORD_NUM_TOKENS,
    TILE_STRIDE,
    add_block,
    add_rows,
    load_b,
    open_tile,
    prefetch,
    prefetch_b,
)
from polybatch.kernels.lora.work import BASE_ROWS, UNIT_FIELDS, UNIT_FIRST, UNIT_ROWS, UNIT_TILE

_BASE_ROWS, _UNIT_STRIDE = tl.constexpr(BASE_ROWS), tl.constexpr(UNIT_FIELDS)
_FIRST, _ROWS, _TILE = tl.constexpr(UNIT_FIRST), tl.constexpr(UNIT_ROWS), tl.constexpr(UNIT_TILE)


@triton.jit(do_not_specialize=["layer", "max_rows"], do_not_specialize_on_alignment=["rows"])
def silu_mul_rows(
    gate_up, stride, out, out_stride, rows, max_rows, tiles, h, memory, words, layer,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, LEAD: tl.constexpr, RANK_ONE: tl.constexpr,
    RANK_FEW: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, EXACT: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: rows, blocks of columns. The first LEAD rows of a dense tile share its block's columns.

    EARLY: started beside the end of the kernel before; see `cuda_delta`.
    """
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0)
    block = tl.program_id(1)
    count = tl.load(rows + row)
    tile = tl.load(rows + max_rows + row)
    token = tl.load(rows + 2 * max_rows + row)
    is_dense = tl.load(rows + 3 * max_rows + row)
    adapters = (tiles, h, memory, words, layer)
    if EARLY:
        if (tile >= 0) & tl.where(is_dense != 0, token < LEAD, count > 0):
            column = block * BLOCK + tl.where(is_dense != 0, token * (BLOCK // LEAD), 0)
            width = tl.minimum(tl.where(is_dense != 0, BLOCK // LEAD, BLOCK), WIDTH - column)
            prefetch_b(tile, 0, column, width, adapters, UNIT, BLOCK)
            prefetch_b(tile, 1, column, width, adapters, UNIT, BLOCK)
        gdc_wait()
    if is_dense:
        if token < LEAD:
            _tile(gate_up, stride, out, out_stride, row - token, tile, block * LEAD + token, adapters,
                  WIDTH, BLOCK // LEAD, 1, UNIT, BLOCK_T, BLOCK_R, True, EXACT, False)  # fmt: skip
    elif count == 1:
        _few_rows(gate_up, stride, out, out_stride, row, count, tile, token, block, adapters,
                  WIDTH, BLOCK, UNIT, 1, RANK_ONE)  # fmt: skip
    elif count > 1:
        _few_rows(gate_up, stride, out, out_stride, row, count, tile, token, block, adapters,
                  WIDTH, BLOCK, UNIT, LEAD, RANK_FEW)  # fmt: skip


@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["units"])
def silu_mul_units(
    gate_up, stride, out, out_stride, units, tiles, h, memory, words, layer,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, EXACT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Programs walk the step's units, block of columns by block, so that none starts in vain.

    Several rows of a tile are on the matrix unit in PIECES of a block. EARLY: see `cuda_delta`.
    """
    if EARLY:
        gdc_launch_dependents()
    num_blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    num_work = tl.load(units) * num_blocks
    adapters = (tiles, h, memory, words, layer)
    if EARLY:
        _prefetch_unit(units, tl.program_id(0), num_work, adapters, WIDTH, BLOCK, UNIT)
        gdc_wait()
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        if EARLY:
            _prefetch_unit(units, work + tl.num_programs(0), num_work, adapters, WIDTH, BLOCK, UNIT)
        unit = units + (1 + work // num_blocks) * _UNIT_STRIDE
        block = work % num_blocks
        row, count, tile = tl.load(unit + _FIRST), tl.load(unit + _ROWS), tl.load(unit + _TILE)
        if tile < 0:
            n = block * BLOCK + tl.arange(0, BLOCK)
            t = tl.arange(0, _BASE_ROWS)
            mask = (t < count)[:, None] & (n < WIDTH)[None, :]
            at = (row + t).to(tl.int64)[:, None]
            gate = tl.load(gate_up + at * stride + n[None, :], mask=mask, other=0.0)
            up = tl.load(gate_up + at * stride + WIDTH + n[None, :], mask=mask, other=0.0)
            _store(gate, up, out + at * out_stride + n[None, :], mask)
        elif count == 1:
            _few_rows(gate_up, stride, out, out_stride, row, count, tile, 0, block, adapters,
                      WIDTH, BLOCK, UNIT, 1, BLOCK_R)  # fmt: skip
        else:
            _tile(gate_up, stride, out, out_stride, row, tile, block * PIECES, adapters,
                  WIDTH, BLOCK // PIECES, PIECES, UNIT, BLOCK_T, BLOCK_R, True, EXACT, False)  # fmt: skip


@triton.jit
def _prefetch_unit(
    units, work, num_work, adapters, WIDTH: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """Send for what one turn reads of B."""
    num_blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    if work < num_work:
        tile = tl.load(units + (1 + work // num_blocks) * _UNIT_STRIDE + _TILE)
        column = work % num_blocks * BLOCK
        if tile >= 0:
            prefetch_b(tile, 0, column, tl.minimum(BLOCK, WIDTH - column), adapters, UNIT, BLOCK)
            prefetch_b(tile, 1, column, tl.minimum(BLOCK, WIDTH - column), adapters, UNIT, BLOCK)


@triton.jit
def _few_rows(
    gate_up, stride, out, out_stride, row, count, tile, token, block, adapters,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    n = block * BLOCK + tl.arange(0, BLOCK)
    t = tl.arange(0, BLOCK_T)
    is_column = n < WIDTH
    mask = (t < count)[:, None] & is_column[None, :]
    at = (row + t).to(tl.int64)[:, None]
    gate = tl.load(gate_up + at * stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at * stride + WIDTH + n[None, :], mask=mask, other=0.0).to(tl.float32)
    if tile >= 0:
        gate = add_rows(gate, token, count, tile, 0, n, is_column, adapters, UNIT, BLOCK_T, BLOCK_R)
        up = add_rows(up, token, count, tile, 1, n, is_column, adapters, UNIT, BLOCK_T, BLOCK_R)
    _store(gate, up, out + at * out_stride + n[None, :], mask)


@triton.jit(do_not_specialize=["layer"])
def silu_mul_tiles(
    gate_up, stride, out, out_stride, bounds, tiles, h, memory, words, layer,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, IS_LONG: tl.constexpr, EXACT: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Grid: NUM_BLOCKS blocks of columns each, wide tiles. AHEAD: send for the next block of y."""
    tile = tl.load(bounds + 2) + tl.program_id(1)
    first = tl.load(tiles + tile * TILE_STRIDE + RECORD_FIRST)
    _tile(gate_up, stride, out, out_stride, first, tile, tl.program_id(0) * NUM_BLOCKS,
          (tiles, h, memory, words, layer),
          WIDTH, BLOCK, NUM_BLOCKS, UNIT, BLOCK_T, BLOCK_R, IS_LONG, EXACT, AHEAD)  # fmt: skip


@triton.jit
def _tile(
    gate_up, stride, out, out_stride, first, tile, first_block, adapters,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, IS_LONG: tl.constexpr, EXACT: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Some blocks of columns of a tile, whose rows begin at `first`. Its h stays from block to block."""
    tiles, _, memory, _, _ = adapters
    t = tl.arange(0, BLOCK_T)
    is_token = t < tl.load(tiles + tile * TILE_STRIDE + RECORD_NUM_TOKENS)
    at = (first + t).to(tl.int64)[:, None]
    row = gate_up + (first + t).to(tl.int64) * stride
    if AHEAD:
        low = first_block * BLOCK
        prefetch(row + low, is_token, WIDTH - low, BLOCK)
        prefetch(row + WIDTH + low, is_token, WIDTH - low, BLOCK)
    start_0, value_0, rest_0 = open_tile(tile, t, is_token, 0, adapters, BLOCK_R)
    start_1, value_1, rest_1 = open_tile(tile, t, is_token, 1, adapters, BLOCK_R)
    for block in range(NUM_BLOCKS):
        if AHEAD:
            low = (first_block + block + 1) * BLOCK
            prefetch(row + low, is_token, WIDTH - low, BLOCK)
            prefetch(row + WIDTH + low, is_token, WIDTH - low, BLOCK)
        n = (first_block + block) * BLOCK + tl.arange(0, BLOCK)
        is_column = n < WIDTH
        mask = is_token[:, None] & is_column[None, :]
        gate = tl.load(gate_up + at * stride + n[None, :], mask=mask, other=0.0)
        up = tl.load(gate_up + at * stride + WIDTH + n[None, :], mask=mask, other=0.0)
        b_0 = load_b(start_0, n, is_column, memory, UNIT)
        b_1 = load_b(start_1, n, is_column, memory, UNIT)
        gate = add_block(gate.to(tl.float32), value_0, b_0, rest_0, n, is_column,
                         UNIT, BLOCK_R, IS_LONG, EXACT)  # fmt: skip
        up = add_block(up.to(tl.float32), value_1, b_1, rest_1, n, is_column, UNIT, BLOCK_R, IS_LONG, EXACT)
        _store(gate, up, out + at * out_stride + n[None, :], mask)


@triton.jit
def _store(gate, up, at, mask):
    kind = at.dtype.element_ty
    gate, up = gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(at, (silu * up).to(kind), mask=mask)
