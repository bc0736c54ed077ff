"""silu_mul over y + B h for CUDA: gate and up get their adapters on the way into the activation.

Rows of decode steps and short chunks are tiles for the matrix unit where they share an adapter, as long
chunks are. A row with its own would be mostly padding; rows without are some to a program. A long chunk's
programs leave h of the next product, down. y + B h is rounded to the dtype, as if it had been written and
read.
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
    HALF_ROWS,
    HALF_UNITS,
    NARROW,
    RANK,
    STRIDE,
    TILE_FIELDS,
    TILE_UNITS,
    UNIT_FIELDS,
    UNIT_FIRST,
    UNIT_PART,
    UNIT_ROWS,
    UNIT_TILE,
)

_BASE_ROWS, _TILE_ROWS = tl.constexpr(BASE_ROWS), tl.constexpr(BLOCK_TOKENS[NARROW])
# To so many a few rows are padded: what is activated in vain takes time.
_HALF_ROWS, _HALF_UNITS, _TILE_UNITS = (
    tl.constexpr(HALF_ROWS),
    tl.constexpr(HALF_UNITS),
    tl.constexpr(TILE_UNITS),
)
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
    PARTS: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: units, or more than there are; blocks of columns, which a tile's units share."""
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
            gate, up = _load(gate_up, stride, at, n, mask, WIDTH)
            _store(gate, up, out + at * out_stride + n[None, :], mask)
        elif count == 1:
            _row(gate_up, stride, out, out_stride, row, tile, block, adapters, WIDTH, BLOCK, UNIT, RANK_ONE,
                 PARTS)  # fmt: skip
        elif count <= _HALF_ROWS:
            _rows(gate_up, stride, out, out_stride, row, count, tile, block * _HALF_UNITS + part, adapters,
                  WIDTH, BLOCK // _HALF_UNITS, BLOCK // _TILE_UNITS, UNIT, _HALF_ROWS, BLOCK_R, STAGES,
                  EXACT)  # fmt: skip
        else:
            _rows(gate_up, stride, out, out_stride, row, count, tile, block * _TILE_UNITS + part, adapters,
                  WIDTH, BLOCK // _TILE_UNITS, BLOCK // _TILE_UNITS, UNIT, _TILE_ROWS, BLOCK_R, STAGES,
                  EXACT)  # fmt: skip


@triton.jit
def _row(
    gate_up, stride, out, out_stride, row, tile, block, adapters,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A row that has its adapter to itself, for which the matrix unit does not pay."""
    n = block * BLOCK + tl.arange(0, BLOCK)
    t = tl.arange(0, 1)
    is_column = n < WIDTH
    mask = is_column[None, :]
    at = (row + t).to(tl.int64)[:, None]
    gate, up = _load(gate_up, stride, at, n, mask, WIDTH)
    _, _, memory, _, _ = adapters
    start_0, value_0, rest_0 = open_rows(tile, 0, t, 1, 0, adapters, BLOCK_R, PARTS)
    start_1, value_1, rest_1 = open_rows(tile, 0, t, 1, 1, adapters, BLOCK_R, PARTS)
    b_0 = load_b(start_0, n, is_column, memory, UNIT, True)
    b_1 = load_b(start_1, n, is_column, memory, UNIT, True)
    gate = add_rows(gate.to(tl.float32), value_0, b_0, rest_0, n, is_column, UNIT, BLOCK_R)
    up = add_rows(up.to(tl.float32), value_1, b_1, rest_1, n, is_column, UNIT, BLOCK_R)
    _store(gate, up, out + at * out_stride + n[None, :], mask)


@triton.jit
def _rows(
    gate_up, stride, out, out_stride, first, count, tile, block, adapters,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TURN: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A block of columns of a narrow tile, TURN at a time.

    Where no module has more than BLOCK_R rows, as nearly always, later turns are on their way.
    """
    t = tl.arange(0, BLOCK_T)
    is_token = t < count
    at = (first + t).to(tl.int64)[:, None]
    start_0, value_0, rest_0 = open_tile(tile, t, is_token, 0, adapters, BLOCK_R)
    start_1, value_1, rest_1 = open_tile(tile, t, is_token, 1, adapters, BLOCK_R)
    _, rank_0, _, _, _, _, _, _, memory = rest_0
    _, rank_1, _, _, _, _, _, _, _ = rest_1
    low = block * BLOCK
    if BLOCK == TURN:
        _block(gate_up, stride, out, out_stride, at, is_token, low + tl.arange(0, TURN),
               start_0, value_0, rest_0, start_1, value_1, rest_1, memory, WIDTH, UNIT, BLOCK_R, True,
               EXACT)  # fmt: skip
    elif tl.maximum(rank_0, rank_1) <= BLOCK_R:
        for turn in tl.range(BLOCK // TURN, num_stages=STAGES):
            _block(gate_up, stride, out, out_stride, at, is_token, low + turn * TURN + tl.arange(0, TURN),
                   start_0, value_0, rest_0, start_1, value_1, rest_1, memory, WIDTH, UNIT, BLOCK_R, False,
                   EXACT)  # fmt: skip
    else:
        for turn in range(BLOCK // TURN):
            _block(gate_up, stride, out, out_stride, at, is_token, low + turn * TURN + tl.arange(0, TURN),
                   start_0, value_0, rest_0, start_1, value_1, rest_1, memory, WIDTH, UNIT, BLOCK_R, True,
                   EXACT)  # fmt: skip


@triton.jit
def _block(
    gate_up, stride, out, out_stride, at, is_token, n, start_0, value_0, rest_0, start_1, value_1, rest_1,
    memory, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, IS_LONG: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Columns n of a tile whose modules were opened."""
    is_column = n < WIDTH
    mask = is_token[:, None] & is_column[None, :]
    gate, up = _load(gate_up, stride, at, n, mask, WIDTH)
    b_0 = load_b(start_0, n, is_column, memory, UNIT)
    b_1 = load_b(start_1, n, is_column, memory, UNIT)
    gate = add_block(gate.to(tl.float32), value_0, b_0, rest_0, n, is_column,
                     UNIT, BLOCK_R, IS_LONG, EXACT)  # fmt: skip
    up = add_block(up.to(tl.float32), value_1, b_1, rest_1, n, is_column, UNIT, BLOCK_R, IS_LONG, EXACT)
    _store(gate, up, out + at * out_stride + n[None, :], mask)


@triton.jit
def _load(gate_up, stride, at, n, mask, WIDTH: tl.constexpr):
    gate = tl.load(gate_up + at * stride + n[None, :], mask=mask, other=0.0)
    up = tl.load(gate_up + at * stride + WIDTH + n[None, :], mask=mask, other=0.0)
    return gate, up


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
    adapters = (tiles, h, memory, words, layer)
    t = tl.arange(0, BLOCK_T)
    is_token = t < count
    at = (first + t).to(tl.int64)[:, None]
    start_0, value_0, rest_0 = open_tile(tile, t, is_token, 0, adapters, BLOCK_R)
    start_1, value_1, rest_1 = open_tile(tile, t, is_token, 1, adapters, BLOCK_R)
    total = tl.zeros([BLOCK_T, DOWN_R], dtype=tl.float32)
    for block in range(NUM_BLOCKS):
        n = (part * NUM_BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        is_column = n < WIDTH
        mask = is_token[:, None] & is_column[None, :]
        gate, up = _load(gate_up, stride, at, n, mask, WIDTH)
        b_0 = load_b(start_0, n, is_column, memory, UNIT)
        b_1 = load_b(start_1, n, is_column, memory, UNIT)
        # In a pipeline these come last, since they are wanted last.
        a = tl.load(memory + start.to(tl.int64)[None, :] * UNIT + n[:, None],
                    mask=(start >= 0)[None, :] & is_column[:, None], other=0.0)  # fmt: skip
        gate = add_block(gate.to(tl.float32), value_0, b_0, rest_0, n, is_column,
                     UNIT, BLOCK_R, IS_LONG, EXACT)  # fmt: skip
        up = add_block(up.to(tl.float32), value_1, b_1, rest_1, n, is_column, UNIT, BLOCK_R, IS_LONG, EXACT)
        done = _store(gate, up, out + at * out_stride + n[None, :], mask)
        total = tl.dot(done, a, total, input_precision="ieee" if EXACT else "tf32")
    # A row that this layer lacks is 0 even where x is infinite.
    total = tl.where((start >= 0)[None, :], total, 0.0)
    target = h + tl.load(down + _H_START).to(tl.int64) + (part * count + t)[:, None] * rank + r[None, :]
    tl.store(target, total, mask=(t < count)[:, None] & (is_down & (r < rank))[None, :])


@triton.jit
def _store(gate, up, at, mask):
    kind = at.dtype.element_ty
    gate, up = gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    done = (silu * up).to(kind)
    tl.store(at, done, mask=mask)
    return done
