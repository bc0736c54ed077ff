"""Compiled rotation of queries and keys, and the scatter of keys and values into pages.

Layout of a page for one key-value head, chosen so that a page's 16 tokens are the 16 lanes of a vector
(D is the head size rounded up to 16, its padding zero; p is 2 elements for bfloat16, 1 for float32):

    keys   [D / p][16 tokens][p]      one 32-bit lane per token, for q . k
    values [16 / p][D][p]             one 32-bit lane per dimension, for weights . v

The work is cut into runs: consecutive new tokens of one sequence in one page. A run that starts a
page clears it first, so whatever lay there before (an adapter, another's keys) can never reach a
sum as a NaN times zero. Queries leave scaled by log2(e) / sqrt(head size), ready for exp2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llvmlite import ir

from polybatch.kernels.cpu.compile import compile_function, detect_isa
from polybatch.kernels.cpu.emit import F32, I16, I32, LANES, V_F32, V_I1, VECTOR_BYTES, Emitter, micro_kernel
from polybatch.kernels.cpu.layout import ITEM_BYTES, NUM_RUNS, PAGE_TOKENS, padded
from polybatch.kernels.cpu.team import (
    ARGS,
    await_units,
    claim,
    load_i32,
    load_i64,
    report_done,
    stack_bytes,
)

if TYPE_CHECKING:
    from polybatch.kernels.cpu.bound import (
        HEAD_BYTES,
        HEAD_DIM,
        NUM_HEADS,
        NUM_KV_HEADS,
        ROW_BYTES,
        SCRATCH_BYTES,
        clear_head,
        scatter_key,
        scatter_value,
        store_row,
        turn_head,
    )

# Arguments after the row's own two.
(QKV, QKV_STRIDE, K_OFFSET, V_OFFSET, Q_OUT, Q_OUT_STRIDE, PAGES, PAGE_BYTES, RUNS, COS_SIN, POSITIONS,
 Q_NORM, K_NORM, EPS, Q_SCALE) = range(ARGS, ARGS + 15)  # fmt: skip

# A run's record (int32): first token, tokens, page, offset in the page.
RUN_FIELDS = 4

ONE_BITS = 0x3F800000
"""1.0 as float32 bits: the factor of keys."""


def head_bytes(head_dim: int, dtype: str) -> int:
    """Bytes that one key-value head takes in a page."""
    return 2 * PAGE_TOKENS * padded(head_dim, LANES) * ITEM_BYTES[dtype]


def _emit_head(head_dim: int, has_norm: bool) -> Any:
    """Rotate one head into float32 scratch, RMS-normed before if the model does so.

    Arguments: src (float32), dst (float32), cosines then sines [2, head_dim / 2], norm weight,
    eps bits, factor bits. Lanes beyond the head's half are computed and never read.
    """
    half = head_dim // 2
    vectors = -(-half // LANES)

    def emit(e: Emitter, x: list[Any]) -> None:
        src, dst, table, weight, eps_bits, factor_bits = x
        b = e.b
        mask = [ir.Constant(V_I1, [v * LANES + i < half for i in range(LANES)]) for v in range(vectors)]

        def part(base: Any, second: bool, v: int) -> Any:
            at = e.add(base, 4 * (half * second + v * LANES))
            return b.select(mask[v], e.load(at, V_F32, 4), e.zeros())

        firsts = [part(src, False, v) for v in range(vectors)]
        seconds = [part(src, True, v) for v in range(vectors)]
        if has_norm:
            total = e.zeros()
            for value in (*firsts, *seconds):
                total = e.fma(value, value, total)
            mean = b.fdiv(e.reduce_add(total), e.f32(float(head_dim)))
            eps = b.bitcast(b.trunc(eps_bits, I32), F32)
            root = e.intrinsic("llvm.sqrt.f32", F32, [b.fadd(mean, eps)])
            inverse = e.splat(b.fdiv(e.f32(1.0), root))
            firsts = [b.fmul(b.fmul(f, inverse), part(weight, False, v)) for v, f in enumerate(firsts)]
            seconds = [b.fmul(b.fmul(s, inverse), part(weight, True, v)) for v, s in enumerate(seconds)]
        factor = e.splat(b.bitcast(b.trunc(factor_bits, I32), F32))
        turned_first, turned_second = [], []
        for v in range(vectors):
            cos, sin = part(table, False, v), part(table, True, v)
            first = b.fsub(b.fmul(firsts[v], cos), b.fmul(seconds[v], sin))
            second = b.fadd(b.fmul(seconds[v], cos), b.fmul(firsts[v], sin))
            turned_first.append(b.fmul(first, factor))
            turned_second.append(b.fmul(second, factor))
        # first halves before second ones: a ragged last vector is overwritten, never overwrites
        for v in range(vectors):
            e.store(turned_first[v], e.add(dst, 4 * v * LANES), 4)
        for v in range(vectors):
            e.store(turned_second[v], e.add(dst, 4 * (half + v * LANES)), 4)

    return emit


def _emit_store_row(width: int, dtype: str) -> Any:
    """dst (dtype, [padded width]) = src (float32, [width]), padding zeroed. Arguments: src, dst."""

    def emit(e: Emitter, x: list[Any]) -> None:
        src, dst = x
        for v in range(padded(width, LANES) // LANES):
            value = e.load(e.add(src, v * VECTOR_BYTES), V_F32, 4)
            valid = [v * LANES + i < width for i in range(LANES)]
            if not all(valid):
                value = e.b.select(ir.Constant(V_I1, valid), value, e.zeros())
            e.store_as(value, e.add(dst, v * LANES * ITEM_BYTES[dtype]), dtype)

    return emit


def _emit_scatter(width: int, dtype: str, is_key: bool) -> Any:
    """Put a row (dtype, contiguous) into a head's keys or values. Arguments: src, head address, offset.

    Keys move as 32-bit lanes, values as single elements.
    """
    item = ITEM_BYTES[dtype]
    pair = 4 // item
    dims = padded(width, LANES)

    def emit(e: Emitter, x: list[Any]) -> None:
        src, head, offset = x
        if is_key:

            def move_key(i: Any, carried: list[Any]) -> list[Any]:
                lane = e.add(head, e.add(e.mul(i, PAGE_TOKENS * 4), e.mul(offset, 4)))
                e.store(e.load(e.add(src, e.mul(i, 4)), I32, 2), lane, 4)
                return carried

            e.loop(e.i64(dims // pair), [], move_key)
            return
        values = e.add(head, PAGE_TOKENS * dims * item)
        row = e.b.udiv(offset, e.i64(pair))
        inside = e.b.urem(offset, e.i64(pair))
        start = e.add(values, e.add(e.mul(row, dims * 4), e.mul(inside, item)))
        kind = I16 if item == 2 else I32

        def move_value(i: Any, carried: list[Any]) -> list[Any]:
            e.store(e.load(e.add(src, e.mul(i, item)), kind, item), e.add(start, e.mul(i, 4)), item)
            return carried

        e.loop(e.i64(dims), [], move_value)

    return emit


def _emit_clear(size: int) -> Any:
    """Zero `size` bytes, a multiple of 64. Arguments: address."""

    def emit(e: Emitter, x: list[Any]) -> None:
        def step(i: Any, carried: list[Any]) -> list[Any]:
            e.store(e.zeros(), e.add(x[0], e.mul(i, VECTOR_BYTES)), 4)
            return carried

        e.loop(e.i64(size // VECTOR_BYTES), [], step)

    return emit


def _write_kv(args: int, state: int, tid: int, num_threads: int) -> None:
    num_runs = load_i64(state, NUM_RUNS)
    qkv, stride = load_i64(args, QKV), load_i64(args, QKV_STRIDE)
    k_offset, v_offset = load_i64(args, K_OFFSET), load_i64(args, V_OFFSET)
    q_out, q_stride = load_i64(args, Q_OUT), load_i64(args, Q_OUT_STRIDE)
    pages, page_bytes = load_i64(args, PAGES), load_i64(args, PAGE_BYTES)
    runs, cos_sin, positions = load_i64(args, RUNS), load_i64(args, COS_SIN), load_i64(args, POSITIONS)
    q_norm, k_norm, eps = load_i64(args, Q_NORM), load_i64(args, K_NORM), load_i64(args, EPS)
    q_scale = load_i64(args, Q_SCALE)
    scratch = stack_bytes(SCRATCH_BYTES)
    row = stack_bytes(SCRATCH_BYTES)
    while True:
        r = claim(load_i64(args, 1))
        if r >= num_runs:
            break
        record = runs + r * RUN_FIELDS * 4
        first, count = load_i32(record, 0), load_i32(record, 1)
        page, offset = pages + load_i32(record, 2) * page_bytes, load_i32(record, 3)
        if offset == 0:
            for h in range(NUM_KV_HEADS):
                clear_head(page + h * HEAD_BYTES)
        for i in range(count):
            token = first + i
            source = qkv + token * stride
            table = cos_sin + load_i32(positions, token) * HEAD_DIM * 4
            for h in range(NUM_HEADS):
                turn_head(source + h * HEAD_DIM * 4, scratch, table, q_norm, eps, q_scale)
                store_row(scratch, q_out + token * q_stride + h * ROW_BYTES)
            for h in range(NUM_KV_HEADS):
                head = page + h * HEAD_BYTES
                turn_head(source + k_offset + h * HEAD_DIM * 4, scratch, table, k_norm, eps, ONE_BITS)
                store_row(scratch, row)
                scatter_key(row, head, offset + i)
                store_row(source + v_offset + h * HEAD_DIM * 4, row)
                scatter_value(row, head, offset + i)
        report_done(load_i64(args, 1))
    await_units(args, num_runs)


def compile_write_kv(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: str, has_norm: bool, isa: str | None = None
) -> int:
    """Address of the operation for one model's heads, with keys and values kept in dtype."""
    chosen = isa or detect_isa()
    bindings: dict[str, Any] = {
        "turn_head": micro_kernel(6, _emit_head(head_dim, has_norm), chosen),
        "store_row": micro_kernel(2, _emit_store_row(head_dim, dtype), chosen),
        "scatter_key": micro_kernel(3, _emit_scatter(head_dim, dtype, True), chosen),
        "scatter_value": micro_kernel(3, _emit_scatter(head_dim, dtype, False), chosen),
        "clear_head": micro_kernel(1, _emit_clear(head_bytes(head_dim, dtype)), chosen),
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "HEAD_BYTES": head_bytes(head_dim, dtype),
        "ROW_BYTES": padded(head_dim, LANES) * ITEM_BYTES[dtype],
        "SCRATCH_BYTES": 4 * (padded(head_dim, LANES) + 2 * LANES),
    }
    name = f"write_kv-{num_heads}-{num_kv_heads}-{head_dim}-{dtype}-{int(has_norm)}"
    return compile_function(name, _write_kv, bindings=bindings, isa=isa)
