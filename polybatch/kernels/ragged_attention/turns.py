"""The loops over an item's keys: online softmax, some keys a turn.

Source: online softmax (Milakov and Gimelshein 2018).
"""

# Triton's own types know nothing of kernels.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turns(
    q, page, begin, end, seen_by_all, position, pool, page_stride, table, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, V_OFFSET: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys begin to end, KEYS a turn: (largest score, sum of weights, weighted values).

    page: page ids of the first turn. seen_by_all: keys before it are seen by every row; turns that end
    there are not masked.
    """
    d = tl.arange(0, D_PAD)
    offset = tl.arange(0, KEYS)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    for start in range(begin, end, KEYS):
        key = start + offset
        at = pool + (page.to(tl.int64) * page_stride + (key % PAGE) * D)[:, None] + d[None, :]
        # Page ids are read a turn ahead: the pipeline then waits for one load, not for one after the other.
        page = tl.load(table + (key + KEYS) // PAGE, mask=key + KEYS < end, other=0)
        # Slots past the end may hold NaN, which a weight of zero would not silence.
        held = (key < end)[:, None]
        if D < D_PAD:
            held &= (d < D)[None, :]
        k = tl.load(at, mask=held, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        # Small tiles are masked at every turn: a branch would cost them more.
        if ROWS <= 16 or WINDOW > 0 or start + KEYS > seen_by_all:
            seen = (key[None, :] <= position[:, None]) & (key < end)[None, :]
            if WINDOW > 0:
                seen &= key[None, :] > position[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(m, tl.max(scores, 1) * scale)
        # A row that has seen nothing yet keeps -inf; its exponents use 0 instead.
        base = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(scores * scale - base[:, None])
        correction = tl.exp2(m - base)
        total = total * correction + tl.sum(weights, 1)
        acc = acc * correction[:, None]
        v = tl.load(at + V_OFFSET, mask=held, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        m = top
    return m, total, acc


@triton.jit
def page_turns(
    q, begin, end, position, pool, page_stride, table, scale,
    D: tl.constexpr, V_OFFSET: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """As `turns`, without a window, two pages a turn, for programs of one warp.

    A page's id is one number for all threads: what is left of addresses is known when compiling. Keys need
    no mask, for scores are masked, but values do, since a weight of zero would not silence NaN.
    """
    slot = tl.arange(0, PAGE)
    inside = slot[:, None] * D + tl.arange(0, D)[None, :]
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    first = begin // PAGE
    id0 = tl.load(table + first, mask=begin < end, other=0)
    id1 = tl.load(table + first + 1, mask=(first + 1) * PAGE < end, other=0)
    stop = tl.where(begin < end, end, 0)
    for start in range(first * PAGE, stop, 2 * PAGE):
        at0 = pool + id0.to(tl.int64) * page_stride + inside
        at1 = pool + id1.to(tl.int64) * page_stride + inside
        key0, key1 = start + slot, start + PAGE + slot
        ahead = table + start // PAGE + 2
        id0 = tl.load(ahead, mask=start + 2 * PAGE < end, other=0)
        id1 = tl.load(ahead + 1, mask=start + 3 * PAGE < end, other=0)
        scores0 = tl.dot(q, tl.trans(tl.load(at0)), input_precision="ieee")
        scores1 = tl.dot(q, tl.trans(tl.load(at1)), input_precision="ieee")
        last = tl.minimum(position, end - 1)[:, None]
        scores0 = tl.where((key0[None, :] <= last) & (key0 >= begin)[None, :], scores0, float("-inf"))
        scores1 = tl.where(key1[None, :] <= last, scores1, float("-inf"))
        top = tl.maximum(m, tl.max(tl.maximum(scores0, scores1), 1) * scale)
        base = tl.where(top == float("-inf"), 0.0, top)
        weights0 = tl.exp2(scores0 * scale - base[:, None])
        weights1 = tl.exp2(scores1 * scale - base[:, None])
        correction = tl.exp2(m - base)
        total = total * correction + tl.sum(weights0 + weights1, 1)
        acc = acc * correction[:, None]
        v0 = tl.load(at0 + V_OFFSET, mask=(key0 < end)[:, None], other=0.0)
        v1 = tl.load(at1 + V_OFFSET, mask=(key1 < end)[:, None], other=0.0)
        acc = tl.dot(weights0.to(v0.dtype), v0, acc, input_precision="ieee")
        acc = tl.dot(weights1.to(v1.dtype), v1, acc, input_precision="ieee")
        m = top
    return m, total, acc
