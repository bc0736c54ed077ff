"""Compiled linear layers against the reference, at odd sizes, and each row's independence of the others."""

import pytest
import torch
from cpu_operations import DTYPES, isa_params, nan_rows, run_operation, zero_padded
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.kernels.cpu.layout import ITEM_BYTES, NUM_TOKENS, padded
from polybatch.kernels.linear import Int4Weight, cpu, int4_linear, int8_linear, quantize_int4, quantize_int8
from polybatch.kernels.linear.cpu_pack import INTEGER_KINDS, Weight, pack
from polybatch.kernels.linear.quantize import GROUP
from polybatch.kernels.norm import cpu as rows_cpu

ENDS = {"store": cpu.STORE, "add": cpu.ADD, "silu": cpu.SILU_MUL}
DEFAULT = [("float32", "store"), ("bfloat16", "silu"), ("int8", "add"), ("int4", "store")]
VARIANTS = [
    pytest.param(kind, end, marks=() if (kind, end) in DEFAULT else pytest.mark.slow)
    for kind in ("float32", "bfloat16", "int8", "int4")
    for end in ENDS
]


def dtype_of(kind):
    return "bfloat16" if kind == "bfloat16" else "float32"


def compiled(x, weights, kind, end, isa, residual=None, num_threads=1):
    """The layer's whole output buffer, [T, padded out], padding included."""
    dtype, num_rows = dtype_of(kind), len(x)
    packed = pack(weights, kind, end == "silu")
    width = padded(x.shape[1])
    groups = width // GROUP
    src = zero_padded(x, width, dtype)
    a, stride = src, width * ITEM_BYTES[dtype]
    scales, sums = nan_rows(num_rows, groups, "float32"), nan_rows(num_rows, groups, "float32")
    state = {NUM_TOKENS: num_rows}
    if kind in INTEGER_KINDS:
        a, stride = torch.full((num_rows, width), -1, dtype=torch.int8), width
        run_operation(rows_cpu.compile_quantize(dtype, kind, isa), {
            rows_cpu.SRC: src.data_ptr(), rows_cpu.SRC_STRIDE: 4 * width, rows_cpu.DST: a.data_ptr(),
            rows_cpu.DST_STRIDE: width, rows_cpu.WIDTH: width, rows_cpu.ROWS_INDEX: NUM_TOKENS,
            rows_cpu.SCALES: scales.data_ptr(), rows_cpu.SUMS: sums.data_ptr(),
            rows_cpu.SUMS_STRIDE: 4 * groups,
        }, state)  # fmt: skip
        steps = packed.in_size // GROUP
    else:
        steps = packed.in_size * ITEM_BYTES[kind] // 4
    columns = packed.num_panels * (32 if end == "silu" else 64)
    out = nan_rows(num_rows, columns, dtype if end == "silu" else "float32")
    if residual is not None:
        out.copy_(zero_padded(residual, columns, "float32"))
    run_operation(cpu.compile_linear(kind, ENDS[end], dtype, dtype, isa), {
        cpu.A_PTR: a.data_ptr(), cpu.A_STRIDE: stride, cpu.A_SCALES: scales.data_ptr(),
        cpu.A_SUMS: sums.data_ptr(), cpu.SUMS_STRIDE: 4 * groups, cpu.W_PTR: packed.data.data_ptr(),
        cpu.PANEL_BYTES: packed.panel_bytes, cpu.NUM_PANELS: packed.num_panels, cpu.STEPS: steps,
        cpu.W_SCALE: packed.scales.data_ptr() if packed.scales is not None else 0,
        cpu.PANELS: torch.from_numpy(packed.records).data_ptr(), cpu.OUT_PTR: out.data_ptr(),
        cpu.OUT_STRIDE: out.element_size() * columns, cpu.ROWS_INDEX: NUM_TOKENS,
        cpu.NEXT_W: packed.data.data_ptr(), cpu.NEXT_PANEL_BYTES: packed.panel_bytes,
    }, state, num_threads)  # fmt: skip
    return out


def product(x, weight, kind):
    if kind == "int8":
        return int8_linear(x, quantize_int8(weight))
    if kind == "int4":
        q = quantize_int4(weight)
        return int4_linear(x, Int4Weight(q.values, q.scales.half().float(), q.mins.half().float()))
    return (x.double() @ weight.double().T).float()


def case(kind, end, num_rows, num_in, num_out, seed):
    generator = torch.Generator().manual_seed(seed)
    num_in = padded(num_in, GROUP) if kind == "int4" else num_in
    rounded = DTYPES[dtype_of(kind)]
    x = torch.randn(num_rows, num_in, generator=generator).to(rounded).float()
    matrices = torch.randn(1 + (end == "silu"), num_out, num_in, generator=generator).to(rounded).float()
    bias = torch.randn(num_out, generator=generator)
    residual = torch.randn(num_rows, num_out, generator=generator) if end == "add" else None
    return x, [Weight(matrix, bias=bias) for matrix in matrices], residual


@pytest.mark.parametrize("isa", isa_params())
@pytest.mark.parametrize(("kind", "end"), VARIANTS)
@settings(max_examples=8, deadline=None)
@given(
    num_rows=st.integers(1, 14), num_in=st.integers(1, 150), num_out=st.integers(1, 140),
    seed=st.integers(0, 2**20),
)  # fmt: skip
def test_linear_equals_its_reference(kind, end, isa, num_rows, num_in, num_out, seed):
    x, weights, residual = case(kind, end, num_rows, num_in, num_out, seed)
    out = compiled(x, weights, kind, end, isa, residual)
    results = [product(x, w.matrix, kind) + w.bias for w in weights]
    expected = results[0] if residual is None else results[0] + residual
    if end == "silu":
        expected = torch.nn.functional.silu(results[0]) * results[1]
    tolerance = {"rtol": 2**-7, "atol": 1e-2} if out.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(out[:, :num_out].float(), expected, **tolerance)
    assert bool((out[:, num_out:] == 0).all())


@pytest.mark.parametrize("isa", isa_params())
@pytest.mark.parametrize(("kind", "end"), VARIANTS)
def test_a_row_has_the_same_bits_whatever_the_number_of_rows_and_threads(kind, end, isa):
    x, weights, residual = case(kind, end, 13, 96, 70, 3)
    whole = compiled(x, weights, kind, end, isa, residual, num_threads=2)
    for count in range(1, 13):
        for first in (0, 13 - count):
            rows = slice(first, first + count)
            part = compiled(x[rows], weights, kind, end, isa, None if residual is None else residual[rows])
            assert torch.equal(part, whole[rows])
