"""The product y + B h in Triton, for a few rows or for a tile, as kernels that read y add it on the way.

A tile's record and the words of its adapter say where the rows of B lie; see `lora.work`.

`adapters` below is the tuple (tiles, h, memory, words, layer) that every kernel is given: records of the
group's tiles, what shrink left, the layer's pool, where rows lie, and which layer it is.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from benchmarks.cuda.lora_before.work import (
    ABSENT,
    FIRST,
    GROUPS,
    H_START,
    MAX_PARTS,
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
_MAX_PARTS = tl.constexpr(MAX_PARTS)


@triton.jit
def add_rows(
    y, token, count, tile, module, n, is_column, adapters,
    UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """gain (y + B h) + bias for `count` tokens of a tile from `token` on, in float32.

    y: [BLOCK_T, N] float32. n: [N] columns of the module. No matrix unit: for so few rows it
    would wait for more than it computes, and one row would be padded to 16.
    """
    tiles, h, memory, words, layer = adapters
    record = tiles + tile * TILE_STRIDE
    b_word = tl.load(record + _MODULE + 3 * module)
    if b_word != _ABSENT:
        num_tokens = tl.load(record + RECORD_NUM_TOKENS)
        h_rank = tl.load(record + _RANK)
        num_parts = tl.load(record + RECORD_PARTS)
        rank = tl.load(record + _MODULE + 3 * module + 1)
        h_first = tl.load(record + _H_START) + tl.load(record + _MODULE + 3 * module + 2)
        word = words + b_word + layer * tl.load(record + _STRIDE)
        gain_start = tl.load(word)
        bias_start = tl.load(word + 1)
        t = tl.arange(0, BLOCK_T)
        part = tl.arange(0, _MAX_PARTS)
        h_rows = h + h_first.to(tl.int64) + (part[:, None] * num_tokens + token + t[None, :]) * h_rank
        is_h_row = (part < num_parts)[:, None] & (t < count)[None, :]
        for low in tl.range(0, rank, BLOCK_R, num_stages=1):
            r = low + tl.arange(0, BLOCK_R)
            start = tl.load(word + 2 + r, mask=r < rank, other=-1)
            b = tl.load(memory + start.to(tl.int64)[:, None] * UNIT + n[None, :],
                        mask=(start >= 0)[:, None] & is_column[None, :], other=0.0)  # fmt: skip
            parts = tl.load(h_rows[:, :, None] + r[None, None, :],
                            mask=is_h_row[:, :, None] & (start >= 0)[None, None, :], other=0.0)  # fmt: skip
            value = tl.sum(parts, axis=0)
            y += tl.sum(value[:, :, None] * b.to(tl.float32)[None, :, :], axis=1)
        y = _scale(y, gain_start, bias_start, memory, n, is_column, UNIT)
    return y


@triton.jit
def open_tile(tile, t, is_token, module, adapters, BLOCK_R: tl.constexpr):
    """A module of a tile for blocks of columns: what `load_b` and `add_block` want.

    The first BLOCK_R rows of B and the sum of their h, then what finds the others. No branch, so that what
    follows can be on its way at once. A module without adapter has no rows.
    """
    tiles, h, memory, words, layer = adapters
    record = tiles + tile * TILE_STRIDE
    b_word = tl.load(record + _MODULE + 3 * module)
    is_there = b_word != _ABSENT
    word = words + tl.where(is_there, b_word + layer * tl.load(record + _STRIDE), 0)
    rank = tl.where(is_there, tl.load(record + _MODULE + 3 * module + 1), 0)
    h_rank = tl.load(record + _RANK)
    first = tl.load(record + _H_START) + tl.load(record + _MODULE + 3 * module + 2)
    h_rows = h + first.to(tl.int64) + t * h_rank
    part_stride, num_parts = tl.load(record + RECORD_NUM_TOKENS) * h_rank, tl.load(record + RECORD_PARTS)
    start = _load_starts(word, rank, 0, BLOCK_R)
    value = _load_h(h_rows, part_stride, num_parts, is_token, rank, 0, BLOCK_R)
    return start, value, (word, rank, is_there, h_rows, part_stride, num_parts, is_token, memory)


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
    return tl.load(word + 2 + r, mask=r < rank, other=-1)


@triton.jit
def load_b(start, n, is_column, memory, UNIT: tl.constexpr):
    """[R, N], rows of B, 0 for those that are missing."""
    return tl.load(memory + start.to(tl.int64)[:, None] * UNIT + n[None, :],
                   mask=(start >= 0)[:, None] & is_column[None, :], other=0.0)  # fmt: skip


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
    word, rank, is_there, h_rows, part_stride, num_parts, is_token, memory = rest
    y = _add_product(y, value, b, EXACT)
    if IS_LONG:
        for low in range(BLOCK_R, rank, BLOCK_R):
            more = load_b(_load_starts(word, rank, low, BLOCK_R), n, is_column, memory, UNIT)
            h = _load_h(h_rows, part_stride, num_parts, is_token, rank, low, BLOCK_R)
            y = _add_product(y, h, more, EXACT)
    gain_start = tl.load(word, mask=is_there, other=-1)
    bias_start = tl.load(word + 1, mask=is_there, other=-1)
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
