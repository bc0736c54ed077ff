"""Compiled first half of the adapters: h = A x, rank-true, rows gathered from pages.

Tokens of one adapter lie side by side in a step, so the work is cut into segments of up to 16 tokens
of one adapter; base tokens have no segment and cost nothing. For every module that reads this input
(q, k and v; or gate and up) a segment multiplies its tokens by the module's A rows. The second half,
B h, happens where the base layer's output tile is finished (`polybatch/kernels/linear/cpu.py`), so
it needs no pass over the output of its own.

Each h is one dot product over vector lanes with a fixed reduction tree, whatever the segment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llvmlite import ir

from polybatch.kernels.cpu.compile import compile_function, detect_isa, inner_function
from polybatch.kernels.cpu.emit import I64, V_I32, VECTOR_BYTES, Emitter, micro_kernel
from polybatch.kernels.cpu.layout import (
    A_ROWS,
    B_ROWS,
    FIELDS,
    H_OFFSET,
    ITEM_BYTES,
    MODULES,
    NUM_SEGMENTS,
    RANK,
)
from polybatch.kernels.cpu.team import (
    ARGS,
    await_units,
    claim,
    load_i32,
    load_i64,
    report_done,
)

if TYPE_CHECKING:
    from polybatch.kernels.cpu.bound import ITEM, prefetch_columns, shrink1, shrink2, shrink4, shrink_tokens

SEGMENT_TOKENS = 16
RANK_BLOCK = 4
ALL_MODULES = len(MODULES)

# Arguments after the row's own two. The MODULE_COUNT modules from FIRST_MODULE on share the input.
X_PTR, X_STRIDE, WIDTH, SEGMENTS, ADAPTER_TABLES, LAYER, FIRST_MODULE, MODULE_COUNT, H_PTR, H_STRIDE = range(
    ARGS, ARGS + 10
)

# A segment's record (int32): first token, tokens, slot of the adapter's table.
SEGMENT_FIELDS = 3


def _emit_shrink(tokens: int, dtype: str) -> Any:
    """h[tokens, j…j+4] = x[tokens, :] . A[j…j+4, :].

    Arguments: x, its row stride, address of 4 row addresses, how many of them count (1 to 4), number of
    vectors, h, its row stride.
    """

    def emit(e: Emitter, x: list[Any]) -> None:
        src, stride, table, valid, count, h, h_stride = x
        b = e.b
        last = b.sub(valid, e.i64(1))
        rows = []
        for j in range(RANK_BLOCK):  # rows past the rank repeat the last one and are not stored
            index = b.select(b.icmp_signed("<", last, e.i64(j)), last, e.i64(j))
            rows.append(e.load(e.add(table, e.mul(index, 8)), I64, 8))
        bases = [e.add(src, e.mul(stride, t)) for t in range(tokens)]
        # rows mostly lie a fixed stride apart: the next block is probably this far on
        next_block = e.mul(b.sub(rows[1], rows[0]), RANK_BLOCK)

        def step(i: Any, accs: list[Any]) -> list[Any]:
            offset = e.mul(i, VECTOR_BYTES)
            weights = [e.load(e.add(row, offset), V_I32, 4) for row in rows]
            for row in rows:
                e.prefetch(e.add(e.add(row, offset), next_block))
            for t in range(tokens):
                value = e.load(e.add(bases[t], offset), V_I32, 4)
                for j in range(RANK_BLOCK):
                    accs[t * RANK_BLOCK + j] = e.dot(accs[t * RANK_BLOCK + j], value, weights[j], dtype)
            return accs

        ends = e.loop(count, [e.zeros()] * (tokens * RANK_BLOCK), step)
        for t in range(tokens):
            for j in range(RANK_BLOCK):
                total = e.reduce_add(ends[t * RANK_BLOCK + j])
                with b.if_then(b.icmp_signed(">", valid, e.i64(j))):
                    b.store(
                        total,
                        b.inttoptr(e.add(e.add(h, e.mul(h_stride, t)), 4 * j), ir.FloatType().as_pointer()),
                    )

    return emit


def _emit_prefetch(lines: int) -> Any:
    """Ask for `lines` cache lines. Arguments: address."""

    def emit(e: Emitter, x: list[Any]) -> None:
        for line in range(lines):
            e.prefetch(e.add(x[0], line * VECTOR_BYTES))

    return emit


def _shrink(args: int, state: int, tid: int, num_threads: int) -> None:
    num_units = load_i64(state, NUM_SEGMENTS) * load_i64(args, MODULE_COUNT)
    x_ptr, x_stride = load_i64(args, X_PTR), load_i64(args, X_STRIDE)
    count = load_i64(args, WIDTH) * ITEM // VECTOR_BYTES
    segments, tables = load_i64(args, SEGMENTS), load_i64(args, ADAPTER_TABLES)
    layer, first_module = load_i64(args, LAYER), load_i64(args, FIRST_MODULE)
    num_modules = load_i64(args, MODULE_COUNT)
    h_ptr, h_stride = load_i64(args, H_PTR), load_i64(args, H_STRIDE)
    while True:
        unit = claim(load_i64(args, 1))
        if unit >= num_units:
            break
        record = segments + (unit // num_modules) * SEGMENT_FIELDS * 4
        module = first_module + unit % num_modules
        first, tokens = load_i32(record, 0), load_i32(record, 1)
        entry = load_i64(tables, load_i32(record, 2)) + (layer * ALL_MODULES + module) * FIELDS * 8
        rank = load_i64(entry, RANK)
        x = x_ptr + first * x_stride
        h = h_ptr + first * h_stride + load_i64(entry, H_OFFSET) * 4
        for j in range(rank):  # the second half begins with the first columns of these
            prefetch_columns(load_i64(load_i64(entry, B_ROWS), j))
        for j in range(0, rank, RANK_BLOCK):
            shrink_tokens(tokens, x, x_stride, load_i64(entry, A_ROWS) + 8 * j, min(RANK_BLOCK, rank - j),
                          count, h + 4 * j, h_stride)  # fmt: skip
        report_done(load_i64(args, 1))
    await_units(args, num_units)


def _shrink_tokens(
    tokens: int, x: int, x_stride: int, table: int, valid: int, count: int, h: int, h_stride: int
) -> None:
    t = 0
    while tokens - t >= 4:
        shrink4(x + t * x_stride, x_stride, table, valid, count, h + t * h_stride, h_stride)
        t += 4
    if tokens - t >= 2:
        shrink2(x + t * x_stride, x_stride, table, valid, count, h + t * h_stride, h_stride)
        t += 2
    if tokens - t >= 1:
        shrink1(x + t * x_stride, x_stride, table, valid, count, h + t * h_stride, h_stride)


def compile_shrink(dtype: str, isa: str | None = None) -> int:
    """Address of the operation for inputs and adapter rows of dtype; h is float32."""
    chosen = isa or detect_isa()
    bindings: dict[str, Any] = {
        f"shrink{tokens}": micro_kernel(7, _emit_shrink(tokens, dtype), chosen) for tokens in (1, 2, 4)
    }
    bindings["prefetch_columns"] = micro_kernel(1, _emit_prefetch(4), chosen)
    bindings["ITEM"] = ITEM_BYTES[dtype]
    bindings["shrink_tokens"] = inner_function(_shrink_tokens, bindings, f"{dtype}-{chosen}")
    return compile_function(f"shrink-{dtype}", _shrink, bindings=bindings, isa=isa)
