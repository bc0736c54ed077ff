"""The product y + B h in Triton, for a few rows or for a tile, as kernels that read y add it on the way.

A tile's record and the words of its adapter say where the rows of B lie; see `lora.work`.

`adapters` below is the tuple (tiles, h, memory, words, layer) that every kernel is given: records of the
group's tiles, what shrink left, the layer's pool, where rows lie, and which layer it is.

In a decode step these kernels are over in microseconds, most of which they wait for one load after another:
a row's tile, its record, its words, its rows. So all that can be asked for at once is, without branches, and
lists and words, which a layer's weights would drive out of the L2 cache before the next kernel reads them,
are kept there (KEEP).
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from polybatch.kernels.lora.work import (
    ABSENT,
    FIRST,
    GROUPS,
    H_START,
    MODULE,
    NUM_TOKENS,
    PARTS,
    RANK,
    STRIDE,
    TILE_FIELDS,
)

TILE_STRIDE = tl.constexpr(len(GROUPS) * TILE_FIELDS)
"""From a tile's record to that of the next tile."""
RECORD_FIRST, RECORD_NUM_TOKENS = tl.constexpr(FIRST), tl.constexpr(NUM_TOKENS)
_H_START, _RANK, _STRIDE = tl.constexpr(H_START), tl.constexpr(RANK), tl.constexpr(STRIDE)
_MODULE, RECORD_PARTS, _ABSENT = tl.constexpr(MODULE), tl.constexpr(PARTS), tl.constexpr(ABSENT)
KEEP = tl.constexpr("evict_last")
"""How lists and words are read."""


@triton.jit
def _open(tile, module, adapters):
    """What a tile's record says of a module, and where its words begin: everything is on its way at once.

    A module without adapter has no rows.
    """
    tiles, _, _, words, layer = adapters
    record = tiles + tile * TILE_STRIDE
    of_module = record + _MODULE + 3 * module
    b_word = tl.load(of_module, eviction_policy=KEEP)
    rank = tl.load(of_module + 1, eviction_policy=KEEP)
    first = tl.load(of_module + 2, eviction_policy=KEEP)
    h_start = tl.load(record + _H_START, eviction_policy=KEEP)
    h_rank = tl.load(record + _RANK, eviction_policy=KEEP)
    num_parts = tl.load(record + RECORD_PARTS, eviction_policy=KEEP)
    num_tokens = tl.load(record + RECORD_NUM_TOKENS, eviction_policy=KEEP)
    stride = tl.load(record + _STRIDE, eviction_policy=KEEP)
    is_there = b_word != _ABSENT
    word = words + tl.where(is_there, b_word + layer * stride, 0)
    return word, tl.where(is_there, rank, 0), is_there, h_start, first, h_rank, num_parts, num_tokens


@triton.jit
def open_rows(tile, token, t, count, module, adapters, BLOCK_R: tl.constexpr, PARTS: tl.constexpr):
    """A module of a tile for `count` tokens from `token` on: what `load_b` and `add_rows` want.

    t: 0 … BLOCK_T - 1. PARTS: most parts that the tile's h may have. The first BLOCK_R rows of B and
    [BLOCK_T, BLOCK_R] of h, then what finds the others.
    """
    word, rank, is_there, h_start, first, h_rank, num_parts, num_tokens = _open(tile, module, adapters)
    _, h, memory, _, _ = adapters
    part = tl.arange(0, PARTS)
    at = (part[:, None] * num_tokens + token + t[None, :]) * h_rank
    h_rows = h + (h_start + first).to(tl.int64) + at
    is_h_row = (part < num_parts)[:, None] & (t < count)[None, :]
    start = _load_starts(word, rank, 0, BLOCK_R)
    value = _sum_h(h_rows, is_h_row, rank, 0, BLOCK_R)
    gain_start, bias_start = _load_scales(word, is_there)
    return start, value, (word, rank, gain_start, bias_start, h_rows, is_h_row, memory)


@triton.jit
def _sum_h(h_rows, is_h_row, rank, low, BLOCK_R: tl.constexpr):
    """[T, BLOCK_R] float32, the sum of h's parts, which are on their way at once."""
    r = low + tl.arange(0, BLOCK_R)
    parts = tl.load(h_rows[:, :, None] + r[None, None, :],
                    mask=is_h_row[:, :, None] & (r < rank)[None, None, :], other=0.0)  # fmt: skip
    return tl.sum(parts, axis=0)


@triton.jit
def add_rows(y, value, b, rest, n, is_column, UNIT: tl.constexpr, BLOCK_R: tl.constexpr):
    """gain (y + B h) + bias for some tokens of a tile, in float32.

    y: [T, N] float32. n: [N] columns of the module. value, rest: from `open_rows`; b: [BLOCK_R, N]. No matrix
    unit: for so few rows it would wait for more than it computes, and one row would be padded to 16. The next
    rows of B are on their way while these are multiplied.
    """
    word, rank, gain_start, bias_start, h_rows, is_h_row, memory = rest
    y += tl.sum(value[:, :, None] * b.to(tl.float32)[None, :, :], axis=1)
    for low in tl.range(BLOCK_R, rank, BLOCK_R, num_stages=1):
        more = load_b(_load_starts(word, rank, low, BLOCK_R), n, is_column, memory, UNIT)
        value = _sum_h(h_rows, is_h_row, rank, low, BLOCK_R)
        y += tl.sum(value[:, :, None] * more.to(tl.float32)[None, :, :], axis=1)
    return _scale(y, gain_start, bias_start, memory, n, is_column, UNIT)


@triton.jit
def open_tile(tile, t, is_token, module, adapters, BLOCK_R: tl.constexpr):
    """A module of a tile for blocks of columns: what `load_b` and `add_block` want.

    The first BLOCK_R rows of B and the sum of their h, then what finds the others.
    """
    word, rank, is_there, h_start, first, h_rank, num_parts, num_tokens = _open(tile, module, adapters)
    _, h, memory, _, _ = adapters
    h_rows = h + (h_start + first).to(tl.int64) + t * h_rank
    part_stride = num_tokens * h_rank
    start = _load_starts(word, rank, 0, BLOCK_R)
    value = _load_h(h_rows, part_stride, num_parts, is_token, rank, 0, BLOCK_R)
    gain_start, bias_start = _load_scales(word, is_there)
    rest = (word, rank, gain_start, bias_start, h_rows, part_stride, num_parts, is_token, memory)
    return start, value, rest


@triton.jit
def _load_h(h_rows, part_stride, num_parts, is_token, rank, low, BLOCK_R: tl.constexpr):
    """[T, BLOCK_R] float32, the sum of h's parts in their order. Four are on their way at a time."""
    r = low + tl.arange(0, BLOCK_R)
    mask = is_token[:, None] & (r < rank)[None, :]
    at = h_rows[:, None] + r[None, :]
    value = tl.zeros([h_rows.shape[0], BLOCK_R], dtype=tl.float32)
    for part in tl.range(0, num_parts, 4, num_stages=1):
        one = tl.load(at + part * part_stride, mask=mask, other=0.0)
        two = tl.load(at + (part + 1) * part_stride, mask=mask & (part + 1 < num_parts), other=0.0)
        three = tl.load(at + (part + 2) * part_stride, mask=mask & (part + 2 < num_parts), other=0.0)
        four = tl.load(at + (part + 3) * part_stride, mask=mask & (part + 3 < num_parts), other=0.0)
        value = value + one + two + three + four
    return value


@triton.jit
def _load_starts(word, rank, low, BLOCK_R: tl.constexpr):
    """[BLOCK_R] int32, where rows of B begin, -1 for those that are missing."""
    r = low + tl.arange(0, BLOCK_R)
    return tl.load(word + 2 + r, mask=r < rank, other=-1, eviction_policy=KEEP)


@triton.jit
def _load_scales(word, is_there):
    """Where gain and bias begin, -1 for none."""
    gain_start = tl.load(word, mask=is_there, other=-1, eviction_policy=KEEP)
    return gain_start, tl.load(word + 1, mask=is_there, other=-1, eviction_policy=KEEP)


@triton.jit
def load_b(start, n, is_column, memory, UNIT: tl.constexpr, IS_ONCE: tl.constexpr = False):
    """[R, N], rows of B, 0 for those that are missing.

    IS_ONCE: whether no other program will want them, so that what others will want stays in the L2 cache.
    """
    at = memory + start.to(tl.int64)[:, None] * UNIT + n[None, :]
    mask = (start >= 0)[:, None] & is_column[None, :]
    if IS_ONCE:
        return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _add_product(y, value, b, EXACT: tl.constexpr):
    """y + value b in float32. value is split into two 16-bit terms, so that nothing of it is lost."""
    if EXACT:
        y = tl.dot(value, b.to(tl.float32), y, input_precision="ieee")
    else:
        high = value.to(b.dtype)
        rest = (value - high.to(tl.float32)).to(b.dtype)
        y = tl.dot(rest, b, y)
        y = tl.dot(high, b, y)
    return y


@triton.jit
def add_block(
    y, value, b, rest, n, is_column,
    UNIT: tl.constexpr, BLOCK_R: tl.constexpr, IS_LONG: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """gain (y + B h) + bias for one block of columns of a tile, on the matrix unit. y: [T, N] float32.

    value, rest: from `open_tile`. b: [BLOCK_R, N], its first rows. IS_LONG: whether there may be more.
    """
    word, rank, gain_start, bias_start, h_rows, part_stride, num_parts, is_token, memory = rest
    y = _add_product(y, value, b, EXACT)
    if IS_LONG:
        for low in range(BLOCK_R, rank, BLOCK_R):
            more = load_b(_load_starts(word, rank, low, BLOCK_R), n, is_column, memory, UNIT)
            h = _load_h(h_rows, part_stride, num_parts, is_token, rank, low, BLOCK_R)
            y = _add_product(y, h, more, EXACT)
    return _scale(y, gain_start, bias_start, memory, n, is_column, UNIT)


@triton.jit
def _scale(y, gain_start, bias_start, memory, n, is_column, UNIT: tl.constexpr):
    if gain_start >= 0:
        gain = tl.load(memory + gain_start.to(tl.int64) * UNIT + n, mask=is_column, other=0.0)
        y *= gain.to(tl.float32)[None, :]
    if bias_start >= 0:
        bias = tl.load(memory + bias_start.to(tl.int64) * UNIT + n, mask=is_column, other=0.0)
        y += bias.to(tl.float32)[None, :]
    return y
