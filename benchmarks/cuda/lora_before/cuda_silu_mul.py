"""silu_mul over y + B h for CUDA: gate and up get their adapters on the way into the activation.

Rows of decode steps and short chunks are some to a program where few share an adapter or have none, and
tiles for the matrix unit where many do, as long chunks are. y + B h is rounded to the dtype, as if it had
been written and read.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from benchmarks.cuda.lora_before.cuda_delta import (
    RECORD_FIRST,
    RECORD_NUM_TOKENS,
    TILE_STRIDE,
    add_block,
    add_rows,
    load_b,
    open_tile,
)
from benchmarks.cuda.lora_before.work import (
    BASE_ROWS,
    DENSE,
    UNIT_FIELDS,
    UNIT_FIRST,
    UNIT_PART,
    UNIT_ROWS,
    UNIT_TILE,
)

_BASE_ROWS, _DENSE = tl.constexpr(BASE_ROWS), tl.constexpr(DENSE)
_UNIT_STRIDE, _PART = tl.constexpr(UNIT_FIELDS), tl.constexpr(UNIT_PART)
_FIRST, _ROWS, _TILE = tl.constexpr(UNIT_FIRST), tl.constexpr(UNIT_ROWS), tl.constexpr(UNIT_TILE)


@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["units"])
def silu_mul_rows(
    gate_up, stride, out, out_stride, units, tiles, h, memory, words, layer,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, LEAD: tl.constexpr, RANK_ONE: tl.constexpr,
    RANK_FEW: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: units, or more than there are; blocks of columns, each of LEAD programs where a tile is dense."""
    if tl.program_id(0) < tl.load(units):
        unit = units + (1 + tl.program_id(0)) * _UNIT_STRIDE
        block = tl.program_id(1)
        row, count, tile = tl.load(unit + _FIRST), tl.load(unit + _ROWS), tl.load(unit + _TILE)
        adapters = (tiles, h, memory, words, layer)
        if tile < 0:
            n = block * BLOCK + tl.arange(0, BLOCK)
            t = tl.arange(0, _BASE_ROWS)
            mask = (t < count)[:, None] & (n < WIDTH)[None, :]
            at = (row + t).to(tl.int64)[:, None]
            gate = tl.load(gate_up + at * stride + n[None, :], mask=mask, other=0.0)
            up = tl.load(gate_up + at * stride + WIDTH + n[None, :], mask=mask, other=0.0)
            _store(gate, up, out + at * out_stride + n[None, :], mask)
        elif count == _DENSE:
            _tile(gate_up, stride, out, out_stride, row, tile, block * LEAD + tl.load(unit + _PART), adapters,
                  WIDTH, BLOCK // LEAD, 1, UNIT, BLOCK_T, BLOCK_R, True, EXACT)  # fmt: skip
        elif count == 1:
            _few_rows(gate_up, stride, out, out_stride, row, count, tile, block, adapters,
                      WIDTH, BLOCK, UNIT, 1, RANK_ONE)  # fmt: skip
        else:
            _few_rows(gate_up, stride, out, out_stride, row, count, tile, block, adapters,
                      WIDTH, BLOCK, UNIT, LEAD, RANK_FEW)  # fmt: skip


@triton.jit
def _few_rows(
    gate_up, stride, out, out_stride, row, count, tile, block, adapters,
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
    gate = add_rows(gate, 0, count, tile, 0, n, is_column, adapters, UNIT, BLOCK_T, BLOCK_R)
    up = add_rows(up, 0, count, tile, 1, n, is_column, adapters, UNIT, BLOCK_T, BLOCK_R)
    _store(gate, up, out + at * out_stride + n[None, :], mask)


@triton.jit(do_not_specialize=["layer"])
def silu_mul_tiles(
    gate_up, stride, out, out_stride, bounds, tiles, h, memory, words, layer,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, IS_LONG: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: NUM_BLOCKS blocks of columns each; wide tiles, or more than there are."""
    tile = tl.load(bounds + 2) + tl.program_id(1)
    if tile >= tl.load(bounds + 3):
        return
    first = tl.load(tiles + tile * TILE_STRIDE + RECORD_FIRST)
    _tile(gate_up, stride, out, out_stride, first, tile, tl.program_id(0) * NUM_BLOCKS,
          (tiles, h, memory, words, layer),
          WIDTH, BLOCK, NUM_BLOCKS, UNIT, BLOCK_T, BLOCK_R, IS_LONG, EXACT)  # fmt: skip


@triton.jit
def _tile(
    gate_up, stride, out, out_stride, first, tile, first_block, adapters,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, IS_LONG: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Some blocks of columns of a tile, whose rows begin at `first`. Its h stays from block to block."""
    tiles, _, memory, _, _ = adapters
    t = tl.arange(0, BLOCK_T)
    is_token = t < tl.load(tiles + tile * TILE_STRIDE + RECORD_NUM_TOKENS)
    at = (first + t).to(tl.int64)[:, None]
    start_0, value_0, rest_0 = open_tile(tile, t, is_token, 0, adapters, BLOCK_R)
    start_1, value_1, rest_1 = open_tile(tile, t, is_token, 1, adapters, BLOCK_R)
    for block in range(NUM_BLOCKS):
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
