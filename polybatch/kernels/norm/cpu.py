"""Compiled row operations: embedding, RMS norm, and the rounding of activations to 8 bits.

Rows are claimed in small blocks; a row is handled by one thread in a fixed order. Buffers have rows
padded with zeros to 64 elements, so every row is a whole number of vectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llvmlite import ir

from polybatch.kernels.cpu.compile import compile_function, detect_isa
from polybatch.kernels.cpu.emit import F32, LANES, V_F32, V_I8, V_I32, VECTOR_BYTES, Emitter, micro_kernel
from polybatch.kernels.cpu.layout import COLUMNS, ITEM_BYTES
from polybatch.kernels.cpu.team import (
    ARGS,
    await_units,
    claim,
    load_i32,
    load_i64,
    report_done,
    store_i64,
)

if TYPE_CHECKING:
    from polybatch.kernels.cpu.bound import LANE_INPUTS, STEP, copy_row, norm_row, quantize_row, store_row

BLOCK = 4
"""Rows that a thread claims at once."""

# Arguments after the row's own two; each operation uses those it needs.
(SRC, SRC_STRIDE, DST, DST_STRIDE, WIDTH, ROWS_INDEX, INDEX_PTR, WEIGHT, SCALES, SUMS, SUMS_STRIDE,
 TRUE_WIDTH, EPS, ROW_COUNT) = range(ARGS, ARGS + 14)  # fmt: skip
STORE_BLOCK = 64
"""Adapter rows that a thread claims at once."""


def _emit_copy(dtype: str) -> Any:
    """dst (float32) = src (dtype). Arguments: src, dst, number of vectors."""

    def emit(e: Emitter, x: list[Any]) -> None:
        src, dst, count = x

        def step(i: Any, carried: list[Any]) -> list[Any]:
            value = e.load_f32(e.add(src, e.mul(i, LANES * ITEM_BYTES[dtype])), dtype)
            e.store(value, e.add(dst, e.mul(i, VECTOR_BYTES)), 4)
            return carried

        e.loop(count, [], step)

    return emit


def _emit_norm(dtype: str) -> Any:
    """dst (dtype) = src / rms(src) * weight. Arguments: src, dst, weight, vectors, true width, eps bits."""

    def emit(e: Emitter, x: list[Any]) -> None:
        src, dst, weight, count, width, eps_bits = x

        def square(i: Any, sums: list[Any]) -> list[Any]:
            value = e.load(e.add(src, e.mul(i, VECTOR_BYTES)), V_F32, 4)
            return [e.fma(value, value, sums[0])]

        total = e.reduce_add(e.loop(count, [e.zeros()], square)[0])
        mean = e.b.fdiv(total, e.b.sitofp(width, F32))
        eps = e.b.bitcast(e.b.trunc(eps_bits, ir.IntType(32)), F32)
        root = e.intrinsic("llvm.sqrt.f32", F32, [e.b.fadd(mean, eps)])
        factor = e.splat(e.b.fdiv(e.f32(1.0), root))

        def scale(i: Any, carried: list[Any]) -> list[Any]:
            offset = e.mul(i, VECTOR_BYTES)
            value = e.b.fmul(e.load(e.add(src, offset), V_F32, 4), factor)
            value = e.b.fmul(value, e.load(e.add(weight, offset), V_F32, 4))
            e.store_as(value, e.add(dst, e.mul(i, LANES * ITEM_BYTES[dtype])), dtype)
            return carried

        e.loop(count, [], scale)

    return emit


def _emit_quantize(dtype: str, kind: str) -> Any:
    """Round a row to 8 bits in groups of 32, with each group's scale and sum as its weights need it.

    The sum is -128 times that of the integers (int32) for int8 weights, whose stored values are 128 too
    high, and the sum of the rounded values (float32) for int4 weights, whose minima it multiplies.
    Arguments: src, dst, scales, sums, number of groups.
    """

    def emit(e: Emitter, x: list[Any]) -> None:
        src, dst, scales, sums, count = x
        b = e.b
        item = ITEM_BYTES[dtype]

        def group(i: Any, carried: list[Any]) -> list[Any]:
            at = e.add(src, e.mul(i, 2 * LANES * item))
            pair = [e.load_f32(e.add(at, n * LANES * item), dtype) for n in range(2)]
            sizes = [e.intrinsic("llvm.fabs.v16f32", V_F32, [value]) for value in pair]
            top = e.reduce_max(e.maximum(*sizes))
            divisor = b.select(b.fcmp_ordered(">", top, e.f32(1e-30)), top, e.f32(1.0))
            factor = e.splat(b.fdiv(e.f32(127.0), divisor))
            scale = b.fdiv(top, e.f32(127.0))
            e.store(scale, e.add(scales, e.mul(i, 4)), 4)
            total = e.zeros(V_I32)
            for n, value in enumerate(pair):
                whole = b.fptosi(e.round(b.fmul(value, factor)), V_I32)
                total = b.add(total, whole)
                e.store(b.trunc(whole, V_I8), e.add(dst, e.add(e.mul(i, 2 * LANES), n * LANES)), 1)
            row_sum = e.reduce_add(total)
            if kind == "int8":
                row_sum = b.mul(row_sum, ir.Constant(ir.IntType(32), -128))
            else:
                row_sum = b.fmul(b.sitofp(row_sum, F32), scale)
            e.store(row_sum, e.add(sums, e.mul(i, 4)), 4)
            return carried

        e.loop(count, [], group)

    return emit


def _embed(args: int, state: int, tid: int, num_threads: int) -> None:
    num_rows = load_i64(state, load_i64(args, ROWS_INDEX))
    tokens = load_i64(args, INDEX_PTR)
    src, src_stride = load_i64(args, SRC), load_i64(args, SRC_STRIDE)
    dst, dst_stride = load_i64(args, DST), load_i64(args, DST_STRIDE)
    vectors = load_i64(args, WIDTH) // LANES
    while True:
        first = claim(load_i64(args, 1)) * BLOCK
        if first >= num_rows:
            break
        for t in range(first, min(first + BLOCK, num_rows)):
            copy_row(src + load_i32(tokens, t) * src_stride, dst + t * dst_stride, vectors)
        report_done(load_i64(args, 1))
    await_units(args, (num_rows + BLOCK - 1) // BLOCK)


def _embed_packed(args: int, state: int, tid: int, num_threads: int) -> None:
    num_rows = load_i64(state, load_i64(args, ROWS_INDEX))
    tokens = load_i64(args, INDEX_PTR)
    src, panel_bytes = load_i64(args, SRC), load_i64(args, SRC_STRIDE)
    dst, dst_stride = load_i64(args, DST), load_i64(args, DST_STRIDE)
    lanes = load_i64(args, WIDTH) // LANE_INPUTS
    while True:
        first = claim(load_i64(args, 1)) * BLOCK
        if first >= num_rows:
            break
        for t in range(first, min(first + BLOCK, num_rows)):
            token = load_i32(tokens, t)
            column = src + token // COLUMNS * panel_bytes + token % COLUMNS * 4
            row = dst + t * dst_stride
            if LANE_INPUTS == 2:  # two bfloat16 are the upper halves of two float32
                for i in range(lanes):
                    pair = load_i32(column, i * COLUMNS)
                    store_i64(row, i, (pair & 0xFFFF) << 16 | (pair >> 16) << 48)
            else:
                for i in range(lanes // 2):
                    low = load_i32(column, 2 * i * COLUMNS) & 0xFFFFFFFF
                    store_i64(row, i, low | load_i32(column, (2 * i + 1) * COLUMNS) << 32)
        report_done(load_i64(args, 1))
    await_units(args, (num_rows + BLOCK - 1) // BLOCK)


def _norm(args: int, state: int, tid: int, num_threads: int) -> None:
    num_rows = load_i64(state, load_i64(args, ROWS_INDEX))
    rows = load_i64(args, INDEX_PTR)
    src, src_stride = load_i64(args, SRC), load_i64(args, SRC_STRIDE)
    dst, dst_stride = load_i64(args, DST), load_i64(args, DST_STRIDE)
    vectors, width = load_i64(args, WIDTH) // LANES, load_i64(args, TRUE_WIDTH)
    weight, eps = load_i64(args, WEIGHT), load_i64(args, EPS)
    while True:
        first = claim(load_i64(args, 1)) * BLOCK
        if first >= num_rows:
            break
        for t in range(first, min(first + BLOCK, num_rows)):
            row = t
            if rows != 0:
                row = load_i32(rows, t)
            norm_row(src + row * src_stride, dst + t * dst_stride, weight, vectors, width, eps)
        report_done(load_i64(args, 1))
    await_units(args, (num_rows + BLOCK - 1) // BLOCK)


def _quantize(args: int, state: int, tid: int, num_threads: int) -> None:
    num_rows = load_i64(state, load_i64(args, ROWS_INDEX))
    src, src_stride = load_i64(args, SRC), load_i64(args, SRC_STRIDE)
    dst, dst_stride = load_i64(args, DST), load_i64(args, DST_STRIDE)
    scales, sums, sums_stride = load_i64(args, SCALES), load_i64(args, SUMS), load_i64(args, SUMS_STRIDE)
    groups = load_i64(args, WIDTH) // (2 * LANES)
    while True:
        first = claim(load_i64(args, 1)) * BLOCK
        if first >= num_rows:
            break
        for t in range(first, min(first + BLOCK, num_rows)):
            quantize_row(src + t * src_stride, dst + t * dst_stride, scales + t * sums_stride,
                         sums + t * sums_stride, groups)  # fmt: skip
        report_done(load_i64(args, 1))
    await_units(args, (num_rows + BLOCK - 1) // BLOCK)


def _store_rows(args: int, state: int, tid: int, num_threads: int) -> None:
    num_rows = load_i64(args, ROW_COUNT)
    src, dst, widths = load_i64(args, SRC), load_i64(args, DST), load_i64(args, WIDTH)
    while True:
        first = claim(load_i64(args, 1)) * STORE_BLOCK
        if first >= num_rows:
            break
        for t in range(first, min(first + STORE_BLOCK, num_rows)):
            width = load_i64(widths, t)
            store_row(load_i64(src, t), load_i64(dst, t), width // STEP, width % STEP)
        report_done(load_i64(args, 1))
    await_units(args, (num_rows + STORE_BLOCK - 1) // STORE_BLOCK)


def _emit_store(dtype: str) -> Any:
    """dst (dtype) = src (float32), a tail of fewer than 64 bytes filled up with zeros.

    Arguments: src, dst, whole steps of 64 bytes of dst, elements left.
    """
    vectors = VECTOR_BYTES // (LANES * ITEM_BYTES[dtype])

    def emit(e: Emitter, x: list[Any]) -> None:
        src, dst, steps, left = x

        def step(i: Any, carried: list[Any]) -> list[Any]:
            for n in range(vectors):
                value = e.load(
                    e.add(src, e.add(e.mul(i, VECTOR_BYTES * vectors), n * VECTOR_BYTES)), V_F32, 4
                )
                at = e.add(dst, e.add(e.mul(i, VECTOR_BYTES), n * LANES * ITEM_BYTES[dtype]))
                e.store_as(value, at, dtype)
            return carried

        e.loop(steps, [], step)
        with e.b.if_then(e.b.icmp_signed(">", left, e.i64(0))):
            at = e.add(dst, e.mul(steps, VECTOR_BYTES))
            for n in range(vectors):
                e.store_as(e.zeros(), e.add(at, n * LANES * ITEM_BYTES[dtype]), dtype)
            tail = e.add(src, e.mul(steps, VECTOR_BYTES * vectors))

            def one(i: Any, carried: list[Any]) -> list[Any]:
                value = e.load(e.add(tail, e.mul(i, 4)), F32, 4)
                if dtype == "float32":
                    e.store(value, e.add(at, e.mul(i, 4)), 4)
                else:
                    half = e.b.extract_element(e.f32_to_bf16(e.splat(value)), ir.Constant(ir.IntType(32), 0))
                    e.store(half, e.add(at, e.mul(i, 2)), 2)
                return carried

            e.loop(left, [], one)

    return emit


def compile_embed(dtype: str, isa: str | None = None) -> int:
    """x[t] (float32) = table[tokens[t]] (dtype)."""
    micro = micro_kernel(3, _emit_copy(dtype), isa or detect_isa())
    return compile_function(f"embed-{dtype}", _embed, bindings={"copy_row": micro}, isa=isa)


def compile_embed_packed(dtype: str, isa: str | None = None) -> int:
    """x[t] (float32) = row tokens[t] of a matrix packed for the linear kernel in dtype, WIDTH inputs of it.

    A tied vocabulary is thus kept once. A row's inputs lie 256 bytes apart, which a step does not notice.
    """
    bindings = {"LANE_INPUTS": 4 // ITEM_BYTES[dtype]}
    return compile_function(f"embed_packed-{dtype}", _embed_packed, bindings=bindings, isa=isa)


def compile_norm(dtype: str, isa: str | None = None) -> int:
    """a[t] (dtype) = rms_norm(x[rows[t]], weight); rows 0 stands for all in order."""
    micro = micro_kernel(6, _emit_norm(dtype), isa or detect_isa())
    return compile_function(f"norm-{dtype}", _norm, bindings={"norm_row": micro}, isa=isa)


def compile_quantize(dtype: str, kind: str, isa: str | None = None) -> int:
    """Rows of `dtype` rounded for int8 or int4 weights, by the formula of `quantize_activations`."""
    micro = micro_kernel(5, _emit_quantize(dtype, kind), isa or detect_isa())
    bindings = {"quantize_row": micro}
    return compile_function(f"quantize-{dtype}-{kind}", _quantize, bindings=bindings, isa=isa)


def compile_store_rows(dtype: str, isa: str | None = None) -> int:
    """Rows of float32 at addresses SRC[i], WIDTH[i] elements long, to DST[i] as dtype, ROW_COUNT of them."""
    micro = micro_kernel(4, _emit_store(dtype), isa or detect_isa())
    bindings = {"store_row": micro, "STEP": VECTOR_BYTES // ITEM_BYTES[dtype]}
    return compile_function(f"store_rows-{dtype}", _store_rows, bindings=bindings, isa=isa)
