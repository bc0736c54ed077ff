"""rms_norm over residual + y + B h for CUDA: o and down get their adapters on the way into the norm.

Rows of decode steps and short chunks are kept in registers, one to LEAD_ROWS to a program. Long chunks go
through in two passes over blocks of columns, of which the second finds the residual in the cache. A row
without adapter costs what it costs in `norm.cuda`. y + B h is rounded to the dtype, then the sum.
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
from polybatch.kernels.lora.work import LEAD_ROWS

_LEAD_ROWS = tl.constexpr(LEAD_ROWS)


@triton.jit(do_not_specialize=["layer", "max_rows"], do_not_specialize_on_alignment=["rows"])
def rms_norm_rows(
    x, x_stride, residual, residual_stride, chosen, weight, out, out_stride, eps,
    rows, max_rows, tiles, h, memory, words, layer,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_CHOSEN: tl.constexpr, UNIT: tl.constexpr,
    LEAD: tl.constexpr, RANK_ONE: tl.constexpr, RANK_FEW: tl.constexpr, STAGES_ONE: tl.constexpr,
    STAGES_FEW: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: rows, or chosen ones, -1 for none; chosen ones leave the residual as it was.

    LEAD: rows of a tile in one program, a divisor of LEAD_ROWS; registers may hold no more than one.
    EARLY: started beside the end of the kernel before; see `cuda_delta`.
    """
    if EARLY:
        gdc_launch_dependents()
    target = tl.program_id(0)
    source = target
    count = 1
    if HAS_CHOSEN:
        source = tl.load(chosen + target)
        count = (source >= 0).to(tl.int32)
    is_row = source >= 0
    tile = tl.load(rows + max_rows + source, mask=is_row, other=-1)
    token = tl.load(rows + 2 * max_rows + source, mask=is_row, other=0)
    if not HAS_CHOSEN:
        # The program that LEAD_ROWS rows would share says how many they are; none in a wide tile.
        place = tl.where(tile >= 0, token % _LEAD_ROWS, 0)
        left = tl.load(rows + source - place) - place
        count = tl.where(place % LEAD == 0, tl.minimum(left, LEAD), 0)
    adapters = (tiles, h, memory, words, layer)
    if EARLY:
        if (tile >= 0) & (count > 0):
            prefetch_b(tile, 0, 0, WIDTH, adapters, UNIT, BLOCK)
        gdc_wait()
    if count == 1:
        _few_rows(x, x_stride, residual, residual_stride, weight, out, out_stride, eps, source, target,
                  count, tile, token, adapters, WIDTH, BLOCK, HAS_CHOSEN, UNIT, 1, RANK_ONE,
                  STAGES_ONE)  # fmt: skip
    elif LEAD > 1 and not HAS_CHOSEN:  # noqa: SIM102 known when compiling, unlike the count
        if count > 1:
            _few_rows(x, x_stride, residual, residual_stride, weight, out, out_stride, eps, source, target,
                      count, tile, token, adapters, WIDTH, BLOCK, HAS_CHOSEN, UNIT, LEAD, RANK_FEW,
                      STAGES_FEW)  # fmt: skip


@triton.jit
def _few_rows(
    x, x_stride, residual, residual_stride, weight, out, out_stride, eps, source, target,
    count, tile, token, adapters,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_CHOSEN: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    kind = out.dtype.element_ty
    n = tl.arange(0, BLOCK)
    t = tl.arange(0, BLOCK_T)
    is_column = n < WIDTH
    mask = (t < count)[:, None] & is_column[None, :]
    at = (source + t).to(tl.int64)[:, None]
    y = tl.load(x + at * x_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    stream = residual + at * residual_stride + n[None, :]
    # Several rows leave no registers for what is needed last.
    if BLOCK_T == 1:
        before = tl.load(stream, mask=mask, other=0.0).to(tl.float32)
    if tile >= 0:
        y = add_rows(y, token, count, tile, 0, n, is_column, adapters, UNIT, BLOCK_T, BLOCK_R, STAGES)
        y = y.to(kind).to(tl.float32)
    if BLOCK_T > 1:
        before = tl.load(stream, mask=mask, other=0.0).to(tl.float32)
    row = (y + before).to(kind)
    if not HAS_CHOSEN:
        tl.store(stream, row, mask=mask)
    scale = tl.load(weight + n, mask=is_column, other=0.0).to(tl.float32)
    row = row.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(row * row, axis=1) / WIDTH + eps)
    normal = (row * inverse[:, None]).to(kind).to(tl.float32)
    to = (target + t).to(tl.int64)[:, None]
    tl.store(out + to * out_stride + n[None, :], (normal * scale[None, :]).to(kind), mask=mask)


@triton.jit(do_not_specialize=["layer"])
def rms_norm_tiles(
    x, x_stride, residual, residual_stride, weight, out, out_stride, eps,
    bounds, tiles, h, memory, words, layer,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr,
    PIECES: tl.constexpr, BLOCK_R: tl.constexpr, IS_LONG: tl.constexpr, EXACT: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Grid: PIECES of BLOCK_T tokens of each wide tile. AHEAD: send for the next block of what is read."""
    kind = out.dtype.element_ty
    tile = tl.load(bounds + 2) + tl.program_id(0) // PIECES
    record = tiles + tile * TILE_STRIDE
    t = (tl.program_id(0) % PIECES) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = t < tl.load(record + RECORD_NUM_TOKENS)
    row_of = (tl.load(record + RECORD_FIRST) + t).to(tl.int64)
    at = row_of[:, None]
    if AHEAD:
        prefetch(x + row_of * x_stride, is_token, WIDTH, BLOCK)
        prefetch(residual + row_of * residual_stride, is_token, WIDTH, BLOCK)
    start, value, rest = open_tile(tile, t, is_token, 0, (tiles, h, memory, words, layer), BLOCK_R)
    squares = tl.zeros([BLOCK_T], dtype=tl.float32)
    for low in range(0, WIDTH, BLOCK):
        if AHEAD:
            then = low + BLOCK
            prefetch(x + row_of * x_stride + then, is_token, WIDTH - then, BLOCK)
            prefetch(residual + row_of * residual_stride + then, is_token, WIDTH - then, BLOCK)
        n = low + tl.arange(0, BLOCK)
        is_column = n < WIDTH
        mask = is_token[:, None] & is_column[None, :]
        y = tl.load(x + at * x_stride + n[None, :], mask=mask, other=0.0)
        stream = residual + at * residual_stride + n[None, :]
        before = tl.load(stream, mask=mask, other=0.0).to(tl.float32)
        b = load_b(start, n, is_column, memory, UNIT)
        y = add_block(y.to(tl.float32), value, b, rest, n, is_column, UNIT, BLOCK_R, IS_LONG, EXACT)
        row = (y.to(kind).to(tl.float32) + before).to(kind)
        tl.store(stream, row, mask=mask)
        squares += tl.sum(row.to(tl.float32) * row.to(tl.float32), axis=1)
    inverse = tl.rsqrt(squares / WIDTH + eps)
    # What other threads of the program stored is read now.
    tl.debug_barrier()
    for low in range(0, WIDTH, BLOCK):
        n = low + tl.arange(0, BLOCK)
        is_column = n < WIDTH
        mask = is_token[:, None] & is_column[None, :]
        row = tl.load(residual + at * residual_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(weight + n, mask=is_column, other=0.0).to(tl.float32)
        normal = (row * inverse[:, None]).to(kind).to(tl.float32)
        tl.store(out + at * out_stride + n[None, :], (normal * scale[None, :]).to(kind), mask=mask)
