"""Compiled ragged attention over paged keys and values.

The unit of work is a tile: up to 12 query rows of one sequence and one key-value head, where a row
is (token, query head of the group), against all keys that they may see. Keys come in blocks of 4 pages (64
tokens) at absolute positions; per block the tile takes scores, an online softmax step and the weighted
sum of values. Because blocks lie at absolute positions and masked keys weigh exactly zero, a row's
arithmetic is the same whatever tile, chunk or batch it is in.

Sequences that share a prefix read the same pages one after the other, out of the cache.

Sources: online softmax (Milakov and Gimelshein 2018), FlashAttention-2 (Dao 2023), PagedAttention
(Kwon et al. 2023). The layout inside a page stands in `polybatch/kernels/write_kv/cpu.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir

from polybatch.kernels.cpu.compile import compile_function, detect_isa, inner_function
from polybatch.kernels.cpu.emit import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    V_F32,
    V_I32,
    VECTOR_BYTES,
    Emitter,
    micro_kernel,
)
from polybatch.kernels.cpu.layout import ITEM_BYTES, NUM_TILES, PAGE_TOKENS, padded
from polybatch.kernels.cpu.team import (
    ARGS,
    await_units,
    claim,
    load_i32,
    load_i64,
    report_done,
    stack_bytes,
    store_f32,
    store_i64,
)
from polybatch.kernels.write_kv.cpu import head_bytes

if TYPE_CHECKING:
    from polybatch.kernels.cpu.bound import (
        DIMS,
        GROUP,
        HEAD_BYTES,
        NUM_KV_HEADS,
        OUT_SCRATCH,
        Q_SCRATCH,
        ROW_BYTES,
        WEIGHT_BYTES,
        WEIGHT_SCRATCH,
        finish_row,
        locate,
        move_row,
        move_weights,
        round_up,
        score_rows,
        scores1,
        scores2,
        scores3,
        scores4,
        scores6,
        scores8,
        scores12,
        softmax_row,
        value_rows,
        values1,
        values2,
        values3,
        values4,
        values6,
        values8,
        values12,
    )

TILE_ROWS = 12
VARIANTS = (1, 2, 3, 4, 6, 8, 12)
BLOCK_PAGES = 4
BLOCK_TOKENS = BLOCK_PAGES * PAGE_TOKENS
SCORE_SCRATCH = TILE_ROWS * BLOCK_TOKENS * 4
STAT_SCRATCH = TILE_ROWS * 16
MINUS_INFINITY = np.float32(-np.inf)
ZERO = np.float32(0)

# Arguments after the row's own two.
Q_PTR, Q_STRIDE, OUT_PTR, OUT_STRIDE, PAGES, PAGE_BYTES, TILES, PAGE_TABLE, TABLE_STRIDE, WINDOW = range(
    ARGS, ARGS + 10
)

# A tile's record (int32): row of the page table, first query row, query rows, index of the chunk's
# first token, its position. Query row r of a chunk is token r // group, head r % group.
TILE_FIELDS = 5


def _emit_scores(rows: int, head_dim: int, dtype: str) -> Any:
    """scores[rows, 64] = q . k over a block.

    Arguments: q [rows, D], 4 key addresses (array), scores, 4 key addresses to prefetch (array).
    """
    dims = padded(head_dim, LANES)
    pair = 4 // ITEM_BYTES[dtype]
    at_once = 4 if rows <= 6 else 2

    def emit(e: Emitter, x: list[Any]) -> None:
        q, heads, scores, ahead = x
        for first in range(0, BLOCK_PAGES, at_once):
            pages = [e.load(e.add(heads, 8 * (first + i)), I64, 8) for i in range(at_once)]
            later = [e.load(e.add(ahead, 8 * (first + i)), I64, 8) for i in range(at_once)]

            def step(
                d: Any, accs: list[Any], pages: list[Any] = pages, later: list[Any] = later
            ) -> list[Any]:
                offset = e.mul(d, VECTOR_BYTES)
                for page in later:
                    e.prefetch(e.add(page, offset))
                keys = [e.load(e.add(page, offset), V_I32, 4) for page in pages]
                for r in range(rows):
                    query = e.splat(
                        e.load(e.add(q, e.add(e.mul(d, 4), r * dims * ITEM_BYTES[dtype])), I32, 4)
                    )
                    for n in range(at_once):
                        accs[r * at_once + n] = e.dot(accs[r * at_once + n], query, keys[n], dtype)
                return accs

            ends = e.loop(e.i64(dims // pair), [e.zeros()] * (rows * at_once), step)
            for i, value in enumerate(ends):
                at = (i // at_once) * BLOCK_TOKENS * 4 + (first + i % at_once) * VECTOR_BYTES
                e.store(value, e.add(scores, at), 64)

    return emit


def _emit_softmax(dtype: str) -> Any:
    """One online softmax step of one row.

    Arguments: scores [64], low and high (lanes that count, as a range within the block), address of
    (maximum, sum, correction) as float32, weights out [64] in dtype.
    """

    def emit(e: Emitter, x: list[Any]) -> None:
        scores, low, high, stats, weights = x
        b = e.b
        minus_infinity = e.constant(float("-inf"))
        low_lanes = e.splat(b.trunc(low, I32))
        high_lanes = e.splat(b.trunc(high, I32))
        values = []
        for n in range(BLOCK_PAGES):
            lanes = ir.Constant(V_I32, [n * LANES + i for i in range(LANES)])
            counts = b.and_(b.icmp_signed(">=", lanes, low_lanes), b.icmp_signed("<", lanes, high_lanes))
            score = e.load(e.add(scores, n * VECTOR_BYTES), V_F32, 64)
            values.append(b.select(counts, score, minus_infinity))
        top = values[0]
        for value in values[1:]:
            top = e.maximum(top, value)
        old = e.load(stats, F32, 4)
        block_top = e.reduce_max(top)
        new = b.select(b.fcmp_ordered(">", block_top, old), block_top, old)
        # a row that has seen no key yet keeps a maximum of -inf; its exponents use 0 instead
        is_empty = b.fcmp_ordered("==", new, e.f32(float("-inf")))
        base = b.select(is_empty, e.f32(0.0), new)
        base_lanes = e.splat(base)
        total = e.zeros()
        for n, value in enumerate(values):
            weight = e.exp2(b.fsub(value, base_lanes))
            total = b.fadd(total, weight)
            e.store_as(weight, e.add(weights, n * LANES * ITEM_BYTES[dtype]), dtype)
        correction = e.exp2(e.splat(b.fsub(old, base)))
        correction = b.extract_element(correction, ir.Constant(I32, 0))
        total_sum = e.load(e.add(stats, 4), F32, 4)
        total_sum = b.fadd(b.fmul(total_sum, correction), e.reduce_add(total))
        e.store(new, stats, 4)
        e.store(total_sum, e.add(stats, 4), 4)
        e.store(correction, e.add(stats, 8), 4)

    return emit


def _emit_values(rows: int, head_dim: int, dtype: str) -> Any:
    """out[rows, D] = out * correction + weights . v over the pages of a block.

    Arguments: weights [rows, 64], value addresses (array), number of pages, out (float32), stats, value
    addresses to prefetch (array).
    """
    dims = padded(head_dim, LANES)
    item = ITEM_BYTES[dtype]
    pair = 4 // item
    at_once = max(1, min(dims // LANES, 24 // rows))

    def emit(e: Emitter, x: list[Any]) -> None:
        weights, heads, num_pages, out, stats, ahead = x
        for first in range(0, dims // LANES, at_once):
            vectors = min(at_once, dims // LANES - first)

            def cell(r: int, n: int, first: int = first) -> Any:
                return e.add(out, (r * dims + (first + n) * LANES) * 4)

            accs = []
            for r in range(rows):
                correction = e.splat(e.load(e.add(stats, 16 * r + 8), F32, 4))
                accs += [e.b.fmul(e.load(cell(r, n), V_F32, 64), correction) for n in range(vectors)]

            def page_step(p: Any, accs: list[Any], first: int = first, vectors: int = vectors) -> list[Any]:
                page = e.load(e.add(heads, e.mul(p, 8)), I64, 8)
                later = e.load(e.add(ahead, e.mul(p, 8)), I64, 8)
                for t in range(PAGE_TOKENS // pair):
                    at = e.add(page, t * dims * 4 + first * VECTOR_BYTES)
                    for n in range(vectors):
                        e.prefetch(e.add(later, t * dims * 4 + (first + n) * VECTOR_BYTES))
                    columns = [e.load(e.add(at, n * VECTOR_BYTES), V_I32, 4) for n in range(vectors)]
                    for r in range(rows):
                        offset = e.mul(p, PAGE_TOKENS * item)
                        at_weight = e.add(weights, e.add(offset, r * BLOCK_TOKENS * item + 4 * t))
                        weight = e.splat(e.load(at_weight, I32, 4))
                        for n in range(vectors):
                            i = r * vectors + n
                            accs[i] = e.dot(accs[i], weight, columns[n], dtype)
                return accs

            ends = e.loop(num_pages, accs, page_step)
            for i, value in enumerate(ends):
                e.store(value, cell(i // vectors, i % vectors), 64)

    return emit


def _emit_finish(head_dim: int, dtype: str) -> Any:
    """dst (dtype) = out / sum. Arguments: out [D] float32, stats, dst."""
    dims = padded(head_dim, LANES)

    def emit(e: Emitter, x: list[Any]) -> None:
        out, stats, dst = x
        inverse = e.splat(e.b.fdiv(e.f32(1.0), e.load(e.add(stats, 4), F32, 4)))
        for n in range(dims // LANES):
            value = e.b.fmul(e.load(e.add(out, n * VECTOR_BYTES), V_F32, 64), inverse)
            e.store_as(value, e.add(dst, n * LANES * ITEM_BYTES[dtype]), dtype)

    return emit


def _emit_move(size: int) -> Any:
    """Copy `size` bytes, a multiple of 32. Arguments: src, dst."""

    def emit(e: Emitter, x: list[Any]) -> None:
        kind = ir.VectorType(I16, LANES)
        for at in range(0, size, 32):
            e.store(e.load(e.add(x[0], at), kind, 2), e.add(x[1], at), 2)

    return emit


def _attend(args: int, state: int, tid: int, num_threads: int) -> None:
    num_units = load_i64(state, NUM_TILES) * NUM_KV_HEADS
    q_ptr, q_stride = load_i64(args, Q_PTR), load_i64(args, Q_STRIDE)
    out_ptr, out_stride = load_i64(args, OUT_PTR), load_i64(args, OUT_STRIDE)
    pages, page_bytes = load_i64(args, PAGES), load_i64(args, PAGE_BYTES)
    tiles, table = load_i64(args, TILES), load_i64(args, PAGE_TABLE)
    table_stride, window = load_i64(args, TABLE_STRIDE), load_i64(args, WINDOW)
    q = stack_bytes(Q_SCRATCH)
    scores = stack_bytes(SCORE_SCRATCH)
    weights = stack_bytes(WEIGHT_SCRATCH)
    out = stack_bytes(OUT_SCRATCH)
    stats = stack_bytes(STAT_SCRATCH)
    keys = stack_bytes(64)
    values = stack_bytes(64)
    next_keys = stack_bytes(64)
    next_values = stack_bytes(64)
    while True:
        unit = claim(load_i64(args, 1))
        if unit >= num_units:
            break
        record = tiles + (unit // NUM_KV_HEADS) * TILE_FIELDS * 4
        kv_head = unit % NUM_KV_HEADS
        page_row = table + load_i32(record, 0) * table_stride
        first_row, rows = load_i32(record, 1), load_i32(record, 2)
        first_token, position = load_i32(record, 3), load_i32(record, 4)
        for r in range(rows):
            token = first_token + (first_row + r) // GROUP
            head = kv_head * GROUP + (first_row + r) % GROUP
            move_row(q_ptr + token * q_stride + head * ROW_BYTES, q + r * ROW_BYTES)
            store_f32(stats, 4 * r, MINUS_INFINITY)
            store_f32(stats, 4 * r + 1, ZERO)
            for d in range(DIMS):
                store_f32(out, r * DIMS + d, ZERO)
        variant = round_up(rows)
        for r in range(rows, variant):  # rows that fill up a variant repeat the first
            move_row(q, q + r * ROW_BYTES)
            store_f32(stats, 4 * r, MINUS_INFINITY)
            store_f32(stats, 4 * r + 1, ZERO)
            store_f32(stats, 4 * r + 2, ZERO)
            for d in range(DIMS):
                store_f32(out, r * DIMS + d, ZERO)
        end = position + (first_row + rows - 1) // GROUP + 1
        start = 0
        if window > 0:
            start = max(0, position + first_row // GROUP + 1 - window)
        first_block, last_block = start // BLOCK_TOKENS, (end + BLOCK_TOKENS - 1) // BLOCK_TOKENS
        head_pages = pages + kv_head * HEAD_BYTES
        locate(page_row, first_block, end, head_pages, page_bytes, keys, values)
        for block in range(first_block, last_block):
            base = block * BLOCK_TOKENS
            num_pages = min(BLOCK_PAGES, (end - base + PAGE_TOKENS - 1) // PAGE_TOKENS)
            if block + 1 < last_block:
                locate(page_row, block + 1, end, head_pages, page_bytes, next_keys, next_values)
            elif unit + num_threads < num_units:  # probably this thread's next tile, from its first block
                guess = tiles + ((unit + num_threads) // NUM_KV_HEADS) * TILE_FIELDS * 4
                guess_start = 0
                if window > 0:
                    guess_start = max(0, load_i32(guess, 4) + load_i32(guess, 1) // GROUP + 1 - window)
                guess_pages = pages + ((unit + num_threads) % NUM_KV_HEADS) * HEAD_BYTES
                locate(table + load_i32(guess, 0) * table_stride, guess_start // BLOCK_TOKENS,
                       load_i32(guess, 4) + 1, guess_pages, page_bytes, next_keys, next_values)  # fmt: skip
            score_rows(variant, q, keys, scores, next_keys)
            for r in range(rows):
                seen = position + (first_row + r) // GROUP + 1
                low = 0
                if window > 0:
                    low = max(0, seen - window - base)
                softmax_row(scores + r * BLOCK_TOKENS * 4, low, seen - base, stats + 16 * r,
                            weights + r * WEIGHT_BYTES)  # fmt: skip
            for r in range(rows, variant):
                move_weights(weights, weights + r * WEIGHT_BYTES)
            value_rows(variant, weights, values, num_pages, out, stats, next_values)
            for i in range(BLOCK_PAGES):
                store_i64(keys, i, load_i64(next_keys, i))
                store_i64(values, i, load_i64(next_values, i))
        for r in range(rows):
            token = first_token + (first_row + r) // GROUP
            head = kv_head * GROUP + (first_row + r) % GROUP
            finish_row(out + r * DIMS * 4, stats + 16 * r, out_ptr + token * out_stride + head * ROW_BYTES)
        report_done(load_i64(args, 1))
    await_units(args, num_units)


def _locate(page_row: int, block: int, end: int, base: int, page_bytes: int, keys: int, values: int) -> None:
    """Addresses of a block's keys and values; pages past the end repeat the last, and are masked."""
    num_pages = max(1, min(BLOCK_PAGES, (end - block * BLOCK_TOKENS + PAGE_TOKENS - 1) // PAGE_TOKENS))
    for i in range(BLOCK_PAGES):
        page = load_i32(page_row, block * BLOCK_PAGES + min(i, num_pages - 1))
        store_i64(keys, i, base + page * page_bytes)
        store_i64(values, i, base + page * page_bytes + HEAD_BYTES // 2)


def _round_up(rows: int) -> int:
    if rows <= 4:
        return rows
    if rows <= 6:
        return 6
    if rows <= 8:
        return 8
    return 12


def _dispatch_scores(variant: int, q: int, keys: int, scores: int, ahead: int) -> None:
    if variant == 1:
        scores1(q, keys, scores, ahead)
    elif variant == 2:
        scores2(q, keys, scores, ahead)
    elif variant == 3:
        scores3(q, keys, scores, ahead)
    elif variant == 4:
        scores4(q, keys, scores, ahead)
    elif variant == 6:
        scores6(q, keys, scores, ahead)
    elif variant == 8:
        scores8(q, keys, scores, ahead)
    else:
        scores12(q, keys, scores, ahead)


def _dispatch_values(
    variant: int, weights: int, values: int, num_pages: int, out: int, stats: int, ahead: int
) -> None:
    if variant == 1:
        values1(weights, values, num_pages, out, stats, ahead)
    elif variant == 2:
        values2(weights, values, num_pages, out, stats, ahead)
    elif variant == 3:
        values3(weights, values, num_pages, out, stats, ahead)
    elif variant == 4:
        values4(weights, values, num_pages, out, stats, ahead)
    elif variant == 6:
        values6(weights, values, num_pages, out, stats, ahead)
    elif variant == 8:
        values8(weights, values, num_pages, out, stats, ahead)
    else:
        values12(weights, values, num_pages, out, stats, ahead)


def compile_attention(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: str, isa: str | None = None
) -> int:
    """Address of the operation for one model's heads; q, k, v and the output are of dtype."""
    name = f"attention-{num_heads}-{num_kv_heads}-{head_dim}-{dtype}"
    chosen = isa or detect_isa()
    dims = padded(head_dim, LANES)
    row_bytes = dims * ITEM_BYTES[dtype]
    weight_bytes = BLOCK_TOKENS * ITEM_BYTES[dtype]
    bindings: dict[str, Any] = {
        "softmax_row": micro_kernel(5, _emit_softmax(dtype), chosen),
        "finish_row": micro_kernel(3, _emit_finish(head_dim, dtype), chosen),
        "move_row": micro_kernel(2, _emit_move(row_bytes), chosen),
        "move_weights": micro_kernel(2, _emit_move(weight_bytes), chosen),
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": num_heads // num_kv_heads,
        "DIMS": dims,
        "ROW_BYTES": row_bytes,
        "HEAD_BYTES": head_bytes(head_dim, dtype),
        "WEIGHT_BYTES": weight_bytes,
        "Q_SCRATCH": TILE_ROWS * row_bytes,
        "WEIGHT_SCRATCH": TILE_ROWS * weight_bytes,
        "OUT_SCRATCH": TILE_ROWS * dims * 4,
    }
    for rows in VARIANTS:
        bindings[f"scores{rows}"] = micro_kernel(4, _emit_scores(rows, head_dim, dtype), chosen)
        bindings[f"values{rows}"] = micro_kernel(6, _emit_values(rows, head_dim, dtype), chosen)
    variant = f"{name}-{chosen}"
    bindings["round_up"] = inner_function(_round_up, {}, variant)
    bindings["locate"] = inner_function(_locate, bindings, variant)
    bindings["score_rows"] = inner_function(_dispatch_scores, bindings, variant)
    bindings["value_rows"] = inner_function(_dispatch_values, bindings, variant)
    return compile_function(name, _attend, bindings=bindings, isa=isa)
