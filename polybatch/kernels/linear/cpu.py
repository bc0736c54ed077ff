"""Compiled linear layer: packed weights, register-tiled matmul, fused epilogues.

y[t] = W x[t] for T tokens, W packed in panels of 64 output columns that threads claim one by one.
A 6 x 64 tile of outputs stays in registers for the whole reduction; then, still in cache, it gets
dequantisation, the adapters' low-rank deltas, gains and biases, and one of three ends: stored, added
to the residual stream, or turned into silu(gate) * up.

Kinds of weights (activations in parentheses):
    float32  (float32)
    bfloat16 (bfloat16), accumulated in float32
    int8     (int8), stored as value + 128, one scale per output column
    int4     (int8), groups of 32 inputs with a float16 scale and minimum

Integer activations are rounded per token in groups of 32 inputs, since a few huge values per token
(usual in small models) would otherwise cost all others their precision.

Every output element is summed over the inputs in one fixed order, whatever T and wherever its row
lies in a tile, so a token's result is bitwise independent of its batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir

from polybatch.kernels.cpu.compile import compile_function, detect_isa, inner_function
from polybatch.kernels.cpu.emit import (
    I32,
    LANES,
    V_F32,
    V_I32,
    VECTOR_BYTES,
    Emitter,
    micro_kernel,
)
from polybatch.kernels.cpu.layout import (
    B_ROWS,
    BIAS,
    COLUMNS,
    FIELDS,
    GAIN,
    H_OFFSET,
    ITEM_BYTES,
    MODULES,
    RANK,
    ROWS,
)
from polybatch.kernels.cpu.team import (
    ARGS,
    await_units,
    claim,
    load_f32,
    load_i32,
    load_i64,
    report_done,
    stack_bytes,
    store_f32,
)
from polybatch.kernels.linear.cpu_pack import INT4_GROUP_BYTES, INTEGER_KINDS, PANEL_FIELDS
from polybatch.kernels.linear.quantize import GROUP

if TYPE_CHECKING:
    from polybatch.kernels.cpu.bound import (
        AHEAD_BYTES,
        DELTA_ITEM,
        HALF_BYTES,
        HALF_COLUMNS,
        HALVES,
        OUT_ITEM,
        end_row,
        expand1,
        expand2,
        expand4,
        expand_rows,
        finish_half,
        tile1,
        tile2,
        tile3,
        tile4,
        tile5,
        tile6,
        tile_of,
    )

VECTORS = COLUMNS // LANES
TILE_STRIDE = COLUMNS * 4
TILE_BYTES = ROWS * TILE_STRIDE
NUM_MODULES = len(MODULES)
MAX_BLOCK = 96
"""Rows of a unit of work at most; their inputs stay in cache."""
INT_LINES = 4
"""Cache lines of the next panel that an integer tile prefetches per group."""

# How a tile ends.
STORE, ADD, SILU_MUL = range(3)

# Arguments of the operation, after the row's own two.
(A_PTR, A_STRIDE, A_SCALES, A_SUMS, SUMS_STRIDE, W_PTR, PANEL_BYTES, NUM_PANELS, STEPS, W_SCALE, PANELS,
 OUT_PTR, OUT_STRIDE, ROWS_INDEX, TOKEN_ADAPTER, ADAPTER_TABLES, LAYER, H_PTR, H_STRIDE, NEXT_W,
 NEXT_PANEL_BYTES) = range(ARGS, ARGS + 21)  # fmt: skip


# ---- micro-kernels


def _emit_tile(rows: int, kind: str) -> Any:
    """tile[rows, 64] = A[rows, :] @ panel in floating point.

    Arguments: A, its row stride in bytes, panel, tile, steps of 4 bytes of A, memory to prefetch (a cache
    line per step).
    """

    def emit(e: Emitter, x: list[Any]) -> None:
        a, stride, panel, tile, steps, ahead = x
        bases = [e.add(a, e.mul(stride, m)) for m in range(rows)]

        def step(k: Any, accs: list[Any]) -> list[Any]:
            at = e.add(panel, e.mul(k, TILE_STRIDE))
            e.prefetch(e.add(ahead, e.mul(k, VECTOR_BYTES)))
            columns = [e.load(e.add(at, VECTOR_BYTES * n), V_I32, 64) for n in range(VECTORS)]
            offset = e.mul(k, 4)
            for m in range(rows):
                row = e.splat(e.load(e.add(bases[m], offset), I32, 4))
                for n in range(VECTORS):
                    i = m * VECTORS + n
                    accs[i] = e.dot(accs[i], row, columns[n], kind)
            return accs

        ends = e.loop(steps, [e.zeros()] * (rows * VECTORS), step)
        for i, value in enumerate(ends):
            e.store(value, e.add(tile, i // VECTORS * TILE_STRIDE + i % VECTORS * VECTOR_BYTES), 64)

    return emit


def _emit_tile_int(rows: int, vectors: int, kind: str) -> Any:
    """tile[rows, 16 * vectors] = A[rows, :] @ panel on integers, dequantised group by group.

    Arguments: A, its row stride in bytes, panel, tile, groups, scales and sums of the rows' groups,
    their row stride in bytes, scales of the panel's columns (int8), first vector of the panel, memory to
    prefetch (INT_LINES cache lines per group).
    """
    half = ir.VectorType(ir.HalfType(), LANES)
    group_bytes = INT4_GROUP_BYTES if kind == "int4" else COLUMNS * GROUP

    def emit(e: Emitter, x: list[Any]) -> None:
        a, stride, panel, tile, groups, a_scales, a_sums, sums_stride, w_scale, first, ahead = x
        b = e.b
        bases = [e.add(a, e.mul(stride, m)) for m in range(rows)]
        scales = [e.add(a_scales, e.mul(sums_stride, m)) for m in range(rows)]
        sums = [e.add(a_sums, e.mul(sums_stride, m)) for m in range(rows)]
        low = e.constant(0x0F0F0F0F, V_I32)
        panel = e.add(panel, e.mul(first, VECTOR_BYTES))
        tile = e.add(tile, e.mul(first, VECTOR_BYTES))
        w_scale = e.add(w_scale, e.mul(first, VECTOR_BYTES))
        tables = e.mul(first, 32 - VECTOR_BYTES)

        def quads(at: Any, n: int) -> list[tuple[int, Any]]:
            """(first input, weights as unsigned bytes) of a group for one vector of columns."""
            if kind == "int8":
                return [
                    (4 * q, e.load(e.add(at, (q * VECTORS + n) * VECTOR_BYTES), V_I32, 64))
                    for q in range(GROUP // 4)
                ]
            found = []
            for v in range(GROUP // 8):
                packed = e.load(e.add(at, (v * VECTORS + n) * VECTOR_BYTES), V_I32, 64)
                found.append((8 * v, b.and_(packed, low)))
                found.append((8 * v + 4, b.and_(b.lshr(packed, e.constant(4, V_I32)), low)))
            return found

        def group(g: Any, accs: list[Any]) -> list[Any]:
            at = e.add(panel, e.mul(g, group_bytes))
            for line in range(INT_LINES):
                e.prefetch(e.add(ahead, e.add(e.mul(g, INT_LINES * VECTOR_BYTES), line * VECTOR_BYTES)))
            offset = e.mul(g, GROUP)
            at_table = e.mul(g, 4)
            row_sums = [e.splat(e.load(e.add(s, at_table), I32, 4)) for s in sums]
            start = row_sums if kind == "int8" else [e.zeros(V_I32)] * rows
            integers = [start[m] for m in range(rows) for _ in range(vectors)]
            weights = [quads(at, n) for n in range(vectors)]
            for q in range(GROUP // 4):
                for m in range(rows):
                    row = e.splat(e.load(e.add(bases[m], e.add(offset, weights[0][q][0])), I32, 4))
                    for n in range(vectors):
                        i = m * vectors + n
                        integers[i] = e.dot(integers[i], weights[n][q][1], row, "int8")
            row_scales = [e.splat(e.load(e.add(s, at_table), ir.FloatType(), 4)) for s in scales]
            for n in range(vectors):
                if kind == "int4":
                    at_scale = e.add(e.add(at, tables), GROUP // 2 * COLUMNS + n * 32)
                    scale = b.fpext(e.load(at_scale, half, 2), V_F32)
                    minimum = b.fpext(e.load(e.add(at_scale, 2 * COLUMNS), half, 2), V_F32)
                for m in range(rows):
                    i = m * vectors + n
                    value = b.sitofp(integers[i], V_F32)
                    if kind == "int8":
                        accs[i] = e.fma(value, row_scales[m], accs[i])
                    else:
                        accs[i] = e.fma(b.fmul(value, row_scales[m]), scale, accs[i])
                        accs[i] = e.fma(b.bitcast(row_sums[m], V_F32), minimum, accs[i])
            return accs

        ends = e.loop(groups, [e.zeros()] * (rows * vectors), group)
        for i, value in enumerate(ends):
            m, n = divmod(i, vectors)
            if kind == "int8":
                value = b.fmul(value, e.load(e.add(w_scale, VECTOR_BYTES * n), V_F32, 4))
            e.store(value, e.add(tile, m * TILE_STRIDE + n * VECTOR_BYTES), 64)

    return emit


def _emit_expand(rows: int, vectors: int, dtype: str) -> Any:
    """tile[rows, 16 * vectors] += sum over j of h[:, j] * B[j]: the adapter's second half.

    Arguments: tile, h, its row stride in bytes, rank, address of the B rows' addresses, byte offset
    of the columns within a B row, distance from there to the columns to prefetch.
    """

    def emit(e: Emitter, x: list[Any]) -> None:
        tile, h, h_stride, rank, table, offset, ahead = x
        hs = [e.add(h, e.mul(h_stride, m)) for m in range(rows)]

        def cell(m: int, n: int) -> Any:
            return e.add(tile, m * TILE_STRIDE + n * VECTOR_BYTES)

        start = [e.load(cell(m, n), V_F32, 64) for m in range(rows) for n in range(vectors)]

        def step(j: Any, accs: list[Any]) -> list[Any]:
            row = e.add(e.load(e.add(table, e.mul(j, 8)), ir.IntType(64), 8), offset)
            item = ITEM_BYTES[dtype]
            columns = [e.load_f32(e.add(row, LANES * item * n), dtype) for n in range(vectors)]
            for line in range(0, vectors * LANES * item, VECTOR_BYTES):
                e.prefetch(e.add(e.add(row, ahead), line))
            for m in range(rows):
                weight = e.splat(e.load(e.add(hs[m], e.mul(j, 4)), ir.FloatType(), 4))
                for n in range(vectors):
                    accs[m * vectors + n] = e.fma(weight, columns[n], accs[m * vectors + n])
            return accs

        ends = e.loop(rank, start, step)
        for i, value in enumerate(ends):
            e.store(value, cell(i // vectors, i % vectors), 64)

    return emit


def _emit_rowwise(end: int, dtype: str) -> Any:
    """Finish one row of a tile. Arguments: tile row, address of its columns in the output."""

    def emit(e: Emitter, x: list[Any]) -> None:
        tile, out = x
        values = [e.load(e.add(tile, n * VECTOR_BYTES), V_F32, 64) for n in range(VECTORS)]
        if end == SILU_MUL:
            for n in range(VECTORS // 2):
                product = e.b.fmul(e.silu(values[n]), values[n + VECTORS // 2])
                e.store_as(product, e.add(out, n * LANES * ITEM_BYTES[dtype]), dtype)
            return
        for n, value in enumerate(values):
            at = e.add(out, n * VECTOR_BYTES)
            e.store(e.b.fadd(value, e.load(at, V_F32, 4)) if end == ADD else value, at, 4)

    return emit


# ---- the operation; names in capitals and the micro-kernels are bound per variant


def _run(args: int, state: int, tid: int, num_threads: int) -> None:
    num_rows = load_i64(state, load_i64(args, ROWS_INDEX))
    if num_rows == 0:
        return
    num_panels = load_i64(args, NUM_PANELS)
    # Panels are the unit of work; few panels are cut along the rows to keep threads level.
    block = num_rows
    if num_rows > MAX_BLOCK:
        block = MAX_BLOCK
    while block > ROWS and num_panels * ((num_rows + block - 1) // block) < 8 * num_threads:
        block = ((block + 1) // 2 + ROWS - 1) // ROWS * ROWS
    blocks = (num_rows + block - 1) // block
    a_ptr, a_stride = load_i64(args, A_PTR), load_i64(args, A_STRIDE)
    a_scales, a_sums = load_i64(args, A_SCALES), load_i64(args, A_SUMS)
    sums_stride = load_i64(args, SUMS_STRIDE)
    w_ptr, panel_bytes = load_i64(args, W_PTR), load_i64(args, PANEL_BYTES)
    steps, w_scale = load_i64(args, STEPS), load_i64(args, W_SCALE)
    out_ptr, out_stride = load_i64(args, OUT_PTR), load_i64(args, OUT_STRIDE)
    token_adapter, tables = load_i64(args, TOKEN_ADAPTER), load_i64(args, ADAPTER_TABLES)
    layer = load_i64(args, LAYER)
    h_ptr, h_stride = load_i64(args, H_PTR), load_i64(args, H_STRIDE)
    next_w, next_panel_bytes = load_i64(args, NEXT_W), load_i64(args, NEXT_PANEL_BYTES)
    tile = stack_bytes(TILE_BYTES)
    num_units = num_panels * blocks
    while True:
        unit = claim(load_i64(args, 1))
        if unit >= num_units:
            break
        p = unit // blocks
        first = (unit % blocks) * block
        last = min(first + block, num_rows)
        panel = w_ptr + p * panel_bytes
        # fetch what this thread will probably want next, of this weight or of the next operation's
        guess = (unit + num_threads) // blocks
        if num_rows <= ROWS:
            ahead = panel
        elif guess < num_panels:
            ahead = w_ptr + guess * panel_bytes
        else:
            ahead = next_w + (guess - num_panels) * next_panel_bytes
        record = load_i64(args, PANELS) + p * PANEL_FIELDS * 8
        out = out_ptr + load_i64(record, 0) * OUT_ITEM
        w_s = w_scale + p * COLUMNS * 4
        for m in range(first, last, ROWS):
            rows = min(ROWS, last - m)
            a = a_ptr + m * a_stride
            scales, sums = a_scales + m * sums_stride, a_sums + m * sums_stride
            tile_of(rows, a, a_stride, panel, tile, steps, scales, sums, sums_stride, w_s, ahead)
            ahead += steps * AHEAD_BYTES
            for half in range(HALVES):
                part = record + (1 + 4 * half) * 8
                finish_half(part, tile + half * HALF_BYTES, m, rows, token_adapter, tables, layer,
                            h_ptr, h_stride, num_threads * HALF_COLUMNS * DELTA_ITEM)  # fmt: skip
            for r in range(rows):
                end_row(tile + r * TILE_STRIDE, out + (m + r) * out_stride)
        report_done(load_i64(args, 1))
    await_units(args, num_units)


def _finish_half(
    part: int,
    tile: int,
    m: int,
    rows: int,
    token_adapter: int,
    tables: int,
    layer: int,
    h_ptr: int,
    h_stride: int,
    ahead: int,
) -> None:
    """Adapters' deltas, gains and biases on the columns of one module in a tile."""
    module, first, valid, bias = load_i64(part, 0), load_i64(part, 1), load_i64(part, 2), load_i64(part, 3)
    if token_adapter != 0 and module >= 0:
        r = 0
        while r < rows:
            slot = load_i32(token_adapter, m + r)
            count = 1
            while r + count < rows and load_i32(token_adapter, m + r + count) == slot:
                count += 1
            if slot >= 0:
                entry = load_i64(tables, slot) + (layer * NUM_MODULES + module) * FIELDS * 8
                rank = load_i64(entry, RANK)
                if rank > 0:
                    h = h_ptr + (m + r) * h_stride + load_i64(entry, H_OFFSET) * 4
                    expand_rows(count, tile + r * TILE_STRIDE, h, h_stride, rank,
                                load_i64(entry, B_ROWS), first * DELTA_ITEM, ahead)  # fmt: skip
                gain = load_i64(entry, GAIN)
                extra = load_i64(entry, BIAS)
                if gain != 0 or extra != 0:
                    for i in range(count):
                        at = tile + (r + i) * TILE_STRIDE
                        for c in range(valid):
                            value = load_f32(at, c)
                            if gain != 0:
                                value *= load_f32(gain, first + c)
                            if extra != 0:
                                value += load_f32(extra, first + c)
                            store_f32(at, c, value)
            r += count
    if bias != 0:
        for r in range(rows):
            at = tile + r * TILE_STRIDE
            for c in range(valid):
                store_f32(at, c, load_f32(at, c) + load_f32(bias, c))
    if valid < HALF_COLUMNS and module >= 0:
        for r in range(rows):  # columns past the matrix stay zero, whatever lay behind an adapter's row
            for c in range(valid, HALF_COLUMNS):
                store_f32(tile + r * TILE_STRIDE, c, np.float32(0))


def _expand_rows(
    count: int, tile: int, h: int, h_stride: int, rank: int, table: int, offset: int, ahead: int
) -> None:
    r = 0
    while count - r >= 4:
        expand4(tile + r * TILE_STRIDE, h + r * h_stride, h_stride, rank, table, offset, ahead)
        r += 4
    if count - r >= 2:
        expand2(tile + r * TILE_STRIDE, h + r * h_stride, h_stride, rank, table, offset, ahead)
        r += 2
    if count - r >= 1:
        expand1(tile + r * TILE_STRIDE, h + r * h_stride, h_stride, rank, table, offset, ahead)


def _tile_float(
    rows: int,
    a: int,
    a_stride: int,
    panel: int,
    tile: int,
    steps: int,
    scales: int,
    sums: int,
    sums_stride: int,
    w_scale: int,
    ahead: int,
) -> None:
    if rows == 6:
        tile6(a, a_stride, panel, tile, steps, ahead)
    elif rows == 5:
        tile5(a, a_stride, panel, tile, steps, ahead)
    elif rows == 4:
        tile4(a, a_stride, panel, tile, steps, ahead)
    elif rows == 3:
        tile3(a, a_stride, panel, tile, steps, ahead)
    elif rows == 2:
        tile2(a, a_stride, panel, tile, steps, ahead)
    else:
        tile1(a, a_stride, panel, tile, steps, ahead)


def _tile_int(
    rows: int,
    a: int,
    a_stride: int,
    panel: int,
    tile: int,
    steps: int,
    scales: int,
    sums: int,
    sums_stride: int,
    w_scale: int,
    ahead: int,
) -> None:
    # integers and floats both want registers: from 4 rows on a tile is done in two halves of its columns
    later = ahead + steps * INT_LINES * VECTOR_BYTES
    if rows == 6:
        tile6(a, a_stride, panel, tile, steps, scales, sums, sums_stride, w_scale, 0, ahead)
        tile6(a, a_stride, panel, tile, steps, scales, sums, sums_stride, w_scale, 2, later)
        return
    r = 0
    if rows >= 4:
        tile4(a, a_stride, panel, tile, steps, scales, sums, sums_stride, w_scale, 0, ahead)
        tile4(a, a_stride, panel, tile, steps, scales, sums, sums_stride, w_scale, 2, later)
        r = 4
    if rows - r >= 2:
        tile2(a + r * a_stride, a_stride, panel, tile + r * TILE_STRIDE, steps, scales + r * sums_stride,
              sums + r * sums_stride, sums_stride, w_scale, 0, ahead)  # fmt: skip
        r += 2
    if rows - r >= 1:
        tile1(a + r * a_stride, a_stride, panel, tile + r * TILE_STRIDE, steps, scales + r * sums_stride,
              sums + r * sums_stride, sums_stride, w_scale, 0, ahead)  # fmt: skip


def compile_linear(kind: str, end: int, out_dtype: str, delta_dtype: str, isa: str | None = None) -> int:
    """Address of the operation for weights of `kind` that ends as `end`.

    out_dtype: of SILU_MUL's product; the other ends write float32. delta_dtype: of adapter rows.
    """
    isa = isa or detect_isa()
    variant = f"linear-{kind}-{end}-{out_dtype}-{delta_dtype}"
    halves = 2 if end == SILU_MUL else 1
    half_columns = COLUMNS // halves
    bindings: dict[str, Any] = {}
    if kind in INTEGER_KINDS:
        for rows, vectors in ((1, 4), (2, 4), (4, 2), (6, 2)):
            bindings[f"tile{rows}"] = micro_kernel(11, _emit_tile_int(rows, vectors, kind), isa)
        tile = _tile_int
    else:
        for rows in range(1, ROWS + 1):
            bindings[f"tile{rows}"] = micro_kernel(6, _emit_tile(rows, kind), isa)
        tile = _tile_float
    for rows in (1, 2, 4):
        bindings[f"expand{rows}"] = micro_kernel(
            7, _emit_expand(rows, half_columns // LANES, delta_dtype), isa
        )
    bindings["end_row"] = micro_kernel(2, _emit_rowwise(end, out_dtype), isa)
    bindings |= {
        "HALVES": halves,
        "HALF_COLUMNS": half_columns,
        "HALF_BYTES": half_columns * 4,
        "OUT_ITEM": ITEM_BYTES[out_dtype] if end == SILU_MUL else 4,
        "DELTA_ITEM": ITEM_BYTES[delta_dtype],
        "AHEAD_BYTES": VECTOR_BYTES * (2 * INT_LINES if kind in INTEGER_KINDS else 1),
    }
    for name, function in (("tile_of", tile), ("expand_rows", _expand_rows), ("finish_half", _finish_half)):
        bindings[name] = inner_function(function, bindings, f"{variant}-{isa}")
    return compile_function(variant, _run, bindings=bindings, isa=isa)
