"""rms_norm over residual + y + B h for CUDA: o and down get their adapters on the way into the norm.

A row of decode steps and short chunks is a program and stays in registers. Long chunks go through in two
passes over blocks of columns, of which the second finds the residual in the cache. A row without adapter
costs what it costs in `norm.cuda`. y + B h is rounded to the dtype, then the sum.
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


@triton.jit(do_not_specialize=["layer", "max_rows"], do_not_specialize_on_alignment=["rows"])
def rms_norm_rows(
    x, x_stride, residual, residual_stride, chosen, weight, out, out_stride, eps,
    rows, max_rows, tiles, h, memory, words, layer,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_CHOSEN: tl.constexpr, HAS_WIDE: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Grid: rows, or chosen ones, -1 for none; chosen ones leave the residual as it was.

    HAS_WIDE: whether rows may be in wide tiles, which are not meant.
    """
    target = tl.program_id(0).to(tl.int64)
    source = target
    if HAS_CHOSEN:
        source = tl.load(chosen + target).to(tl.int64)
        if source < 0:
            return
    tile = tl.load(rows + max_rows + source, eviction_policy=KEEP)
    token = tl.load(rows + 2 * max_rows + source, eviction_policy=KEEP)
    if HAS_WIDE:  # noqa: SIM102 known when compiling
        # Nothing leads in a wide tile.
        if tl.load(rows + source - tl.where(tile >= 0, token, 0)) == 0:
            return
    kind = out.dtype.element_ty
    n = tl.arange(0, BLOCK)
    is_column = n < WIDTH
    mask = is_column[None, :]
    y = tl.load(x + source * x_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    stream = residual + source * residual_stride + n[None, :]
    before = tl.load(stream, mask=mask, other=0.0)
    scale = tl.load(weight + n, mask=is_column, other=0.0)
    if tile >= 0:
        adapters = (tiles, h, memory, words, layer)
        start, value, rest = open_rows(tile, token, tl.arange(0, 1), 1, 0, adapters, BLOCK_R, PARTS)
        b = load_b(start, n, is_column, memory, UNIT)
        y = add_rows(y, value, b, rest, n, is_column, UNIT, BLOCK_R)
        y = y.to(kind).to(tl.float32)
    row = (y + before.to(tl.float32)).to(kind)
    if not HAS_CHOSEN:
        tl.store(stream, row, mask=mask)
    row = row.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(row * row, axis=1) / WIDTH + eps)
    normal = (row * inverse[:, None]).to(kind).to(tl.float32)
    scaled = (normal * scale.to(tl.float32)[None, :]).to(kind)
    tl.store(out + target * out_stride + n[None, :], scaled, mask=mask)


@triton.jit(do_not_specialize=["layer"])
def rms_norm_tiles(
    x, x_stride, residual, residual_stride, weight, out, out_stride, eps,
    bounds, tiles, h, memory, words, layer,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr,
    PIECES: tl.constexpr, BLOCK_R: tl.constexpr, IS_LONG: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: PIECES of BLOCK_T tokens of each wide tile, or more than there are."""
    kind = out.dtype.element_ty
    tile = tl.load(bounds + 2) + tl.program_id(0) // PIECES
    if tile >= tl.load(bounds + 3):
        return
    record = tiles + tile * TILE_STRIDE
    t = (tl.program_id(0) % PIECES) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = t < tl.load(record + RECORD_NUM_TOKENS)
    at = (tl.load(record + RECORD_FIRST) + t).to(tl.int64)[:, None]
    start, value, rest = open_tile(tile, t, is_token, 0, (tiles, h, memory, words, layer), BLOCK_R)
    squares = tl.zeros([BLOCK_T], dtype=tl.float32)
    for low in range(0, WIDTH, BLOCK):
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
