"""silu_mul over y + B h for CUDA: gate and up get their adapters on the way into the activation.

Rows of decode steps and short chunks are some to a program where few share an adapter or have none, and
tiles for the matrix unit where many do, as long chunks are. A long chunk's programs leave h of the next
product, down. y + B h is rounded to the dtype, as if it had been written and read.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from polybatch.kernels.lora.cuda_delta import (
    KEEP,
    RECORD_FIRST,
    RECORD_NUM_TOKENS,
    TILE_STRIDE,
    add_block,
    add_rows,
    load_b,
    open_rows,
    open_tile,
)
from polybatch.kernels.lora.work import (
    A_WORD,
    BASE_ROWS,
    BLOCK_TOKENS,
    BOUND_FIELDS,
    H_START,
    LEAD_ROWS,
    NARROW,
    RANK,
    STRIDE,
    TILE_FIELDS,
    UNIT_FIELDS,
    UNIT_FIRST,
    UNIT_PART,
    UNIT_ROWS,
    UNIT_TILE,
)

_BASE_ROWS, _LEAD_ROWS = tl.constexpr(BASE_ROWS), tl.constexpr(LEAD_ROWS)
_TILE_ROWS = tl.constexpr(BLOCK_TOKENS[NARROW])
_H_START, _RANK, _STRIDE = tl.constexpr(H_START), tl.constexpr(RANK), tl.constexpr(STRIDE)
_A_WORD, _TILE_FIELDS, _BOUND_FIELDS = (
    tl.constexpr(A_WORD),
    tl.constexpr(TILE_FIELDS),
    tl.constexpr(BOUND_FIELDS),
)
_UNIT_STRIDE, _PART = tl.constexpr(UNIT_FIELDS), tl.constexpr(UNIT_PART)
_FIRST, _ROWS, _TILE = tl.constexpr(UNIT_FIRST), tl.constexpr(UNIT_ROWS), tl.constexpr(UNIT_TILE)


@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["units"])
def silu_mul_rows(
    gate_up, stride, out, out_stride, units, tiles, h, memory, words, layer,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, RANK_ONE: tl.constexpr,
    RANK_FEW: tl.constexpr, BLOCK_R: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: units, or more than there are; blocks of columns, which a dense tile's units share."""
    index, block = tl.program_id(0), tl.program_id(1)
    unit = units + (1 + index) * _UNIT_STRIDE
    num_units = tl.load(units, eviction_policy=KEEP)
    row = tl.load(unit + _FIRST, eviction_policy=KEEP)
    count = tl.load(unit + _ROWS, eviction_policy=KEEP)
    tile = tl.load(unit + _TILE, eviction_policy=KEEP)
    part = tl.load(unit + _PART, eviction_policy=KEEP)
    if index < num_units:
        adapters = (tiles, h, memory, words, layer)
        if tile < 0:
            n = block * BLOCK + tl.arange(0, BLOCK)
            t = tl.arange(0, _BASE_ROWS)
            mask = (t < count)[:, None] & (n < WIDTH)[None, :]
            at = (row + t).to(tl.int64)[:, None]
            gate = tl.load(gate_up + at * stride + n[None, :], mask=mask, other=0.0)
            up = tl.load(gate_up + at * stride + WIDTH + n[None, :], mask=mask, other=0.0)
            _store(gate, up, out + at * out_stride + n[None, :], mask)
        elif count >= _LEAD_ROWS:
            _tile(gate_up, stride, out, out_stride, row, count, tile, block * _LEAD_ROWS + part, adapters,
                  0, WIDTH, BLOCK // _LEAD_ROWS, 1, UNIT, _TILE_ROWS, BLOCK_R, 1, True, EXACT)  # fmt: skip
        elif count == 1:
            _few_rows(gate_up, stride, out, out_stride, row, count, tile, block, adapters,
                      WIDTH, BLOCK, UNIT, 1, RANK_ONE)  # fmt: skip
        else:
            _few_rows(gate_up, stride, out, out_stride, row, count, tile, block, adapters,
                      WIDTH, BLOCK, UNIT, _LEAD_ROWS, RANK_FEW)  # fmt: skip


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
    gate = tl.load(gate_up + at * stride + n[None, :], mask=mask, other=0.0)
    up = tl.load(gate_up + at * stride + WIDTH + n[None, :], mask=mask, other=0.0)
    _, _, memory, _, _ = adapters
    start_0, value_0, rest_0 = open_rows(tile, 0, t, count, 0, adapters, BLOCK_R)
    start_1, value_1, rest_1 = open_rows(tile, 0, t, count, 1, adapters, BLOCK_R)
    b_0 = load_b(start_0, n, is_column, memory, UNIT)
    b_1 = load_b(start_1, n, is_column, memory, UNIT)
    gate = add_rows(gate.to(tl.float32), value_0, b_0, rest_0, n, is_column, UNIT, BLOCK_R)
    up = add_rows(up.to(tl.float32), value_1, b_1, rest_1, n, is_column, UNIT, BLOCK_R)
    _store(gate, up, out + at * out_stride + n[None, :], mask)


@triton.jit(do_not_specialize=["layer"])
def silu_mul_tiles(
    gate_up, stride, out, out_stride, bounds, tiles, h, memory, words, layer,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, DOWN_R: tl.constexpr, IS_LONG: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: NUM_BLOCKS blocks of columns each; wide tiles, or more than there are.

    Where shrink has no item for the next group, down, this leaves it the tile's h over the program's columns,
    one of its parts: what was activated is at hand. DOWN_R: most rows of A then.
    """
    tile = tl.load(bounds + 2) + tl.program_id(1)
    if tile >= tl.load(bounds + 3):
        return
    record = tiles + tile * TILE_STRIDE
    down = record + _TILE_FIELDS
    is_down = tl.load(bounds + _BOUND_FIELDS) == tl.load(bounds + _BOUND_FIELDS + 1)
    rank = tl.load(down + _RANK)
    r = tl.arange(0, DOWN_R)
    word = tl.load(down + _A_WORD) + layer * tl.load(down + _STRIDE)
    start = tl.load(words + word + r, mask=is_down & (r < rank), other=-1)
    first, count = tl.load(record + RECORD_FIRST), tl.load(record + RECORD_NUM_TOKENS)
    part = tl.program_id(0)
    total = _tile(
        gate_up, stride, out, out_stride, first, count, tile, part * NUM_BLOCKS,
        (tiles, h, memory, words, layer), start,
        WIDTH, BLOCK, NUM_BLOCKS, UNIT, BLOCK_T, BLOCK_R, DOWN_R, IS_LONG, EXACT,
    )  # fmt: skip
    # A row that this layer lacks is 0 even where x is infinite.
    total = tl.where((start >= 0)[None, :], total, 0.0)
    t = tl.arange(0, BLOCK_T)
    target = h + tl.load(down + _H_START).to(tl.int64) + (part * count + t)[:, None] * rank + r[None, :]
    tl.store(target, total, mask=(t < count)[:, None] & (is_down & (r < rank))[None, :])


@triton.jit
def _tile(
    gate_up, stride, out, out_stride, first, count, tile, first_block, adapters, a_start,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, DOWN_R: tl.constexpr, IS_LONG: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Some blocks of columns of a tile's `count` rows from `first` on. Its h stays from block to block.

    Returns [BLOCK_T, DOWN_R] float32: what was activated times the rows of A that begin at a_start, -1 for
    none. DOWN_R is 1 where nothing is asked for.
    """
    _, _, memory, _, _ = adapters
    t = tl.arange(0, BLOCK_T)
    is_token = t < count
    at = (first + t).to(tl.int64)[:, None]
    start_0, value_0, rest_0 = open_tile(tile, t, is_token, 0, adapters, BLOCK_R)
    start_1, value_1, rest_1 = open_tile(tile, t, is_token, 1, adapters, BLOCK_R)
    total = tl.zeros([BLOCK_T, DOWN_R], dtype=tl.float32)
    for block in range(NUM_BLOCKS):
        n = (first_block + block) * BLOCK + tl.arange(0, BLOCK)
        is_column = n < WIDTH
        mask = is_token[:, None] & is_column[None, :]
        gate = tl.load(gate_up + at * stride + n[None, :], mask=mask, other=0.0)
        up = tl.load(gate_up + at * stride + WIDTH + n[None, :], mask=mask, other=0.0)
        b_0 = load_b(start_0, n, is_column, memory, UNIT)
        b_1 = load_b(start_1, n, is_column, memory, UNIT)
        if DOWN_R > 1:
            a = tl.load(memory + a_start.to(tl.int64)[None, :] * UNIT + n[:, None],
                        mask=(a_start >= 0)[None, :] & is_column[:, None], other=0.0)  # fmt: skip
        gate = add_block(gate.to(tl.float32), value_0, b_0, rest_0, n, is_column,
                         UNIT, BLOCK_R, IS_LONG, EXACT)  # fmt: skip
        up = add_block(up.to(tl.float32), value_1, b_1, rest_1, n, is_column, UNIT, BLOCK_R, IS_LONG, EXACT)
        done = _store(gate, up, out + at * out_stride + n[None, :], mask)
        if DOWN_R > 1:
            total = tl.dot(done, a, total, input_precision="ieee" if EXACT else "tf32")
    return total


@triton.jit
def _store(gate, up, at, mask):
    kind = at.dtype.element_ty
    gate, up = gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    done = (silu * up).to(kind)
    tl.store(at, done, mask=mask)
    return done
