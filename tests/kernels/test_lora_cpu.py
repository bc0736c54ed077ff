"""Compiled shrink and expand against the reference: random segments, ranks, widths and dtypes.

The expand runs where it belongs, in the end of a linear layer's tiles; the layer's weights are random, too.
"""

import dataclasses

import numpy as np
import pytest
import torch
from cpu_operations import DTYPES, isa_params, nan_rows, run_operation, zero_padded
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lora_reference import scattered

from polybatch.kernels.cpu.layout import (
    A_ROWS,
    B_ROWS,
    BIAS,
    FIELDS,
    GAIN,
    H_OFFSET,
    ITEM_BYTES,
    MODULES,
    NUM_SEGMENTS,
    NUM_TOKENS,
    RANK,
    padded,
)
from polybatch.kernels.linear import cpu as linear_cpu
from polybatch.kernels.linear.cpu_pack import Weight, pack
from polybatch.kernels.lora import cpu, lora

NUM_LAYERS, LAYER = 2, 1
FIRST_MODULE = 0


@dataclasses.dataclass
class Case:
    """x: [T, in]. weights: of the modules that share x. owners: [T], adapter or None, equal ones adjacent.

    memory, tables: as `scattered` makes them, one of each per module.
    """

    x: torch.Tensor
    weights: list[torch.Tensor]
    owners: list[int | None]
    ranks: list[list[int]]
    memory: list[torch.Tensor]
    tables: list


def make_case(dtype, owners, ranks, num_in, num_outs, dense, seed):
    """ranks: per module, of each adapter."""
    generator = torch.Generator().manual_seed(seed)
    rounded = DTYPES[dtype]
    x = torch.randn(len(owners), num_in, generator=generator).to(rounded)
    memory, tables, weights = [], [], []
    for module_ranks, num_out in zip(ranks, num_outs, strict=True):
        # rows have a whole cache line each, filled up with zeros, and the last columns' prefetch behind them
        wide = padded(num_in, 32), padded(num_out, 32)
        rows, table, a, _ = scattered(module_ranks, *wide, generator, rounded, dense)
        for r in range(len(a)):
            rows[table.a_rows[r] + num_in : table.a_rows[r] + wide[0]] = 0
        memory.append(torch.cat([rows, torch.full((512,), torch.nan, dtype=rounded)]))
        tables.append(table)
        weights.append((torch.randn(num_out, num_in, generator=generator) * num_in**-0.5).to(rounded).float())
    return Case(x, weights, owners, ranks, memory, tables)


def runs(owners):
    """(first, tokens, adapter) of neighbours with one adapter."""
    found, first = [], 0
    for t in range(1, len(owners) + 1):
        if t == len(owners) or owners[t] != owners[first]:
            if owners[first] is not None:
                found.append((first, t - first, owners[first]))
            first = t
    return found


def adapter_tables(case, dtype):
    """Addresses of the adapters' tables, and what they point to."""
    kept, addresses = [], []
    for n in range(len(case.ranks[0])):
        table = np.zeros((NUM_LAYERS, len(MODULES), FIELDS), dtype=np.int64)
        offset = 0
        for module, (memory, where) in enumerate(zip(case.memory, case.tables, strict=True)):
            low, high = where.row_bounds[n : n + 2].tolist()
            entry = table[LAYER, FIRST_MODULE + module]
            entry[RANK], entry[H_OFFSET] = high - low, offset
            offset += high - low
            for field, starts in ((A_ROWS, where.a_rows), (B_ROWS, where.b_rows)):
                rows = memory.data_ptr() + ITEM_BYTES[dtype] * starts[low:high].numpy()
                kept.append(np.ascontiguousarray(rows))
                entry[field] = kept[-1].ctypes.data
            for field, dense in ((GAIN, where.gain), (BIAS, where.bias)):
                if dense is not None:
                    kept.append(dense[n].contiguous())
                    entry[field] = kept[-1].data_ptr()
        kept.append(table)
        addresses.append(table.ctypes.data)
    return np.array(addresses, dtype=np.int64), kept


def compiled(case, dtype, isa, end=linear_cpu.STORE, num_threads=1):
    """The layer's output with adapters, [T, out] of all modules side by side."""
    num_tokens, num_in = case.x.shape
    width, item = padded(num_in), ITEM_BYTES[dtype]
    x = zero_padded(case.x, width, dtype)
    tables, kept = adapter_tables(case, dtype)
    num_ranks = max(sum(ranks) for ranks in zip(*case.ranks, strict=True))
    h = nan_rows(num_tokens, padded(max(num_ranks, 1), 16), "float32")
    token_adapter = torch.tensor([-1 if n is None else n for n in case.owners], dtype=torch.int32)
    pieces = [
        (start, min(cpu.SEGMENT_TOKENS, first + length - start), n)
        for first, length, n in runs(case.owners)
        for start in range(first, first + length, cpu.SEGMENT_TOKENS)
    ]
    segments = np.zeros((len(pieces) + 1, cpu.SEGMENT_FIELDS), dtype=np.int32)
    if pieces:
        segments[: len(pieces)] = pieces
    state = {NUM_TOKENS: num_tokens, NUM_SEGMENTS: len(pieces)}
    run_operation(cpu.compile_shrink(dtype, isa), {
        cpu.X_PTR: x.data_ptr(), cpu.X_STRIDE: width * item, cpu.WIDTH: padded(num_in, 64 // item),
        cpu.SEGMENTS: segments.ctypes.data, cpu.ADAPTER_TABLES: tables.ctypes.data, cpu.LAYER: LAYER,
        cpu.FIRST_MODULE: FIRST_MODULE, cpu.MODULE_COUNT: len(case.weights), cpu.H_PTR: h.data_ptr(),
        cpu.H_STRIDE: 4 * h.shape[1],
    }, state, num_threads)  # fmt: skip
    is_silu = end == linear_cpu.SILU_MUL
    packed = pack([Weight(w, FIRST_MODULE + m) for m, w in enumerate(case.weights)], dtype, is_silu)
    columns = packed.num_panels * (32 if is_silu else 64)
    out = nan_rows(num_tokens, columns, dtype if is_silu else "float32")
    run_operation(linear_cpu.compile_linear(dtype, end, dtype, dtype, isa), {
        linear_cpu.A_PTR: x.data_ptr(), linear_cpu.A_STRIDE: width * item,
        linear_cpu.W_PTR: packed.data.data_ptr(), linear_cpu.PANEL_BYTES: packed.panel_bytes,
        linear_cpu.NUM_PANELS: packed.num_panels, linear_cpu.STEPS: packed.in_size * item // 4,
        linear_cpu.PANELS: torch.from_numpy(packed.records).data_ptr(), linear_cpu.OUT_PTR: out.data_ptr(),
        linear_cpu.OUT_STRIDE: out.element_size() * columns, linear_cpu.ROWS_INDEX: NUM_TOKENS,
        linear_cpu.TOKEN_ADAPTER: token_adapter.data_ptr(), linear_cpu.ADAPTER_TABLES: tables.ctypes.data,
        linear_cpu.LAYER: LAYER, linear_cpu.H_PTR: h.data_ptr(), linear_cpu.H_STRIDE: 4 * h.shape[1],
        linear_cpu.NEXT_W: packed.data.data_ptr(), linear_cpu.NEXT_PANEL_BYTES: packed.panel_bytes,
    }, state, num_threads)  # fmt: skip
    del kept
    if is_silu:
        return out[:, : len(case.weights[0])]
    starts = np.cumsum([0, *(padded(len(w)) for w in case.weights)])
    return torch.cat([out[:, s : s + len(w)] for s, w in zip(starts, case.weights, strict=False)], 1)


def expected(case, end=linear_cpu.STORE):
    """The same through the reference, in float32."""
    segments = [(first, first + length, n) for first, length, n in runs(case.owners)]
    parts = []
    for weight, memory, table in zip(case.weights, case.memory, case.tables, strict=True):
        wide = padded(case.x.shape[1], 32)
        x = torch.zeros(len(case.x), wide)
        x[:, : case.x.shape[1]] = case.x.float()
        y = torch.zeros(len(x), padded(len(weight), 32))
        y[:, : len(weight)] = case.x.float() @ weight.T
        lora(x, y, memory, torch.tensor(segments, dtype=torch.int32).reshape(-1, 3), table)
        parts.append(y[:, : len(weight)])
    if end == linear_cpu.SILU_MUL:
        return torch.nn.functional.silu(parts[0]) * parts[1]
    return torch.cat(parts, 1)


def owners_of(lengths):
    return [None if n < 0 else n for length, n in lengths for _ in range(length)]


ENDS = {"store": linear_cpu.STORE, "silu": linear_cpu.SILU_MUL}


@pytest.mark.parametrize("isa", isa_params())
@pytest.mark.parametrize(
    ("dtype", "end"), [("float32", "store"), ("bfloat16", "store"), ("bfloat16", "silu")]
)
@settings(max_examples=12, deadline=None)
@given(
    ranks=st.lists(
        st.tuples(*[st.sampled_from([0, 1, 3, 4, 9, 17, 64])] * 2), min_size=1, max_size=4
    ),
    lengths=st.lists(st.tuples(st.integers(1, 23), st.integers(-1, 3)), min_size=1, max_size=6),
    num_in=st.integers(1, 150),
    num_outs=st.tuples(st.integers(1, 140), st.integers(1, 140)),
    dense=st.booleans(),
    seed=st.integers(0, 2**20),
)  # fmt: skip
def test_compiled_adapters_equal_their_reference(
    dtype, end, isa, ranks, lengths, num_in, num_outs, dense, seed
):
    if end == "silu":
        num_outs = num_outs[:1] * 2
    owners = owners_of([(length, n if n < len(ranks) else -1) for length, n in lengths])
    case = make_case(
        dtype, owners, [list(m) for m in zip(*ranks, strict=True)], num_in, num_outs, dense, seed
    )
    got, wanted = compiled(case, dtype, isa, ENDS[end]), expected(case, ENDS[end])
    # a sum over up to 150 inputs times one over up to 64 ranks: rounding grows with the largest value
    scale = float(wanted.abs().max()) + 1.0
    tolerance = {"float32": 2e-5, "bfloat16": 2**-7 if end == "silu" else 1e-4}[dtype]
    torch.testing.assert_close(got.float(), wanted, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("isa", isa_params())
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_alone_and_among_others(dtype, isa):
    owners = owners_of([(7, 0), (3, -1), (21, 1), (1, 2), (2, 3), (40, 0), (5, 2)])
    ranks = [[64, 4, 17, 0], [9, 4, 64, 3]]
    case = make_case(dtype, owners, ranks, 96, (140, 70), dense=True, seed=4)
    whole = compiled(case, dtype, isa, num_threads=2)
    for t in range(len(owners)):
        alone = dataclasses.replace(case, x=case.x[t : t + 1], owners=owners[t : t + 1])
        assert torch.equal(compiled(alone, dtype, isa)[0], whole[t])
