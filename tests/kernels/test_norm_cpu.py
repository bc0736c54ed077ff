"""Compiled row operations against torch, on NaN-filled memory."""

import struct

import pytest
import torch
from cpu_operations import DTYPES, constant, int32, isa_params, nan_rows, run_operation, zero_padded
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.kernels.cpu.layout import NUM_LOGITS, NUM_TOKENS, padded
from polybatch.kernels.linear import quantize_activations
from polybatch.kernels.linear.cpu_pack import Weight, pack
from polybatch.kernels.norm import cpu, rms_norm

sizes = st.tuples(st.integers(0, 19), st.integers(1, 150))
seeds = st.integers(0, 2**20)


@pytest.mark.parametrize("isa", isa_params())
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=10, deadline=None)
@given(size=sizes, is_indexed=st.booleans(), seed=seeds)
def test_norm_equals_its_reference(dtype, isa, size, is_indexed, seed):
    generator = torch.Generator().manual_seed(seed)
    num_rows, width = size
    x = 3 * torch.randn(num_rows + 4, width, generator=generator)
    weight = torch.randn(width, generator=generator)
    index = torch.randint(num_rows + 4, (num_rows,), generator=generator).int()
    src, wide = zero_padded(x, padded(width), "float32"), constant(weight, 64)
    out = nan_rows(num_rows, padded(width), dtype)
    eps = 1e-5
    run_operation(cpu.compile_norm(dtype, isa), {
        cpu.SRC: src.data_ptr(), cpu.SRC_STRIDE: 4 * padded(width), cpu.DST: out.data_ptr(),
        cpu.DST_STRIDE: out.element_size() * padded(width), cpu.WIDTH: padded(width),
        cpu.ROWS_INDEX: NUM_LOGITS, cpu.INDEX_PTR: index.data_ptr() if is_indexed else 0,
        cpu.WEIGHT: wide.data_ptr(), cpu.TRUE_WIDTH: width,
        cpu.EPS: struct.unpack("<i", struct.pack("<f", eps))[0],
    }, {NUM_LOGITS: num_rows})  # fmt: skip
    expected = rms_norm(x[index.long()] if is_indexed else x[:num_rows], weight, eps)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(out[:, :width].float(), expected, **tolerance)
    assert bool((out[:, width:] == 0).all())


@pytest.mark.parametrize("isa", isa_params())
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_rows_are_copied_exactly(dtype, isa):
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(7, 70, generator=generator).to(DTYPES[dtype])
    rows = zero_padded(table, 128, dtype)
    tokens = int32([6, 0, 3, 3, 5])
    out = nan_rows(5, 128, "float32")
    run_operation(cpu.compile_embed(dtype, isa), {
        cpu.SRC: rows.data_ptr(), cpu.SRC_STRIDE: rows.element_size() * 128, cpu.DST: out.data_ptr(),
        cpu.DST_STRIDE: 4 * 128, cpu.WIDTH: 128, cpu.ROWS_INDEX: NUM_TOKENS, cpu.INDEX_PTR: tokens.data_ptr(),
    }, {NUM_TOKENS: 5})  # fmt: skip
    assert torch.equal(out[:, :70], table[tokens.long()].float())
    assert bool((out[:, 70:] == 0).all())


@pytest.mark.parametrize("isa", isa_params())
@pytest.mark.parametrize("kind", ["int8", "int4"])
@settings(max_examples=10, deadline=None)
@given(size=st.tuples(st.integers(1, 19), st.integers(1, 150)), seed=seeds)
def test_activations_are_rounded_exactly_as_by_the_shared_quantiser(kind, isa, size, seed):
    generator = torch.Generator().manual_seed(seed)
    num_rows, width = size
    x = torch.randn(num_rows, width, generator=generator) * 10.0 ** torch.randint(-3, 4, (num_rows, 1))
    x[:, ::7] = 0
    groups = padded(width, 32) // 32
    src = zero_padded(x, 32 * groups, "float32")
    out = torch.full((num_rows, 32 * groups), -128, dtype=torch.int8)
    scales, sums = nan_rows(num_rows, groups, "float32"), nan_rows(num_rows, groups, "float32")
    run_operation(cpu.compile_quantize("float32", kind, isa), {
        cpu.SRC: src.data_ptr(), cpu.SRC_STRIDE: 128 * groups, cpu.DST: out.data_ptr(),
        cpu.DST_STRIDE: 32 * groups, cpu.WIDTH: 32 * groups, cpu.ROWS_INDEX: NUM_TOKENS,
        cpu.SCALES: scales.data_ptr(), cpu.SUMS: sums.data_ptr(), cpu.SUMS_STRIDE: 4 * groups,
    }, {NUM_TOKENS: num_rows})  # fmt: skip
    values, expected_scales = quantize_activations(x)
    assert torch.equal(out, values)
    assert torch.equal(scales, expected_scales)
    totals = values.view(num_rows, groups, 32).int().sum(dim=2)
    if kind == "int8":
        assert torch.equal(sums.view(torch.int32), -128 * totals.int())
    else:
        assert torch.equal(sums, totals * expected_scales)


@pytest.mark.parametrize("isa", isa_params())
@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_adapter_rows_are_filled_up_with_zeros_to_a_cache_line_and_no_further(dtype, isa):
    generator = torch.Generator().manual_seed(2)
    widths = torch.tensor([1, 15, 16, 33, 64, 70, 96, 127])
    rows = [torch.randn(int(width), generator=generator) for width in widths]
    line = 64 // DTYPES[dtype].itemsize
    out = nan_rows(len(rows), 192, dtype)
    sources = torch.tensor([row.data_ptr() for row in rows])
    targets = torch.tensor([row.data_ptr() for row in out])
    run_operation(cpu.compile_store_rows(dtype, isa), {
        cpu.SRC: sources.data_ptr(), cpu.DST: targets.data_ptr(), cpu.WIDTH: widths.data_ptr(),
        cpu.ROW_COUNT: len(rows),
    }, {})  # fmt: skip
    for row, stored in zip(rows, out, strict=True):
        assert torch.equal(stored[: len(row)], row.to(DTYPES[dtype]))
        assert bool((stored[len(row) : padded(len(row), line)] == 0).all())
        assert bool(stored[padded(len(row), line) :].isnan().all())


@pytest.mark.parametrize("isa", isa_params())
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_rows_come_out_of_a_packed_head_exactly(dtype, isa):
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(150, 70, generator=generator)
    packed = pack([Weight(table)], dtype)
    tokens = int32([149, 0, 63, 64, 64, 127, 128])
    out = zero_padded(torch.zeros(7, 128), 128, "float32")
    run_operation(cpu.compile_embed_packed(dtype, isa), {
        cpu.SRC: packed.data.data_ptr(), cpu.SRC_STRIDE: packed.panel_bytes, cpu.DST: out.data_ptr(),
        cpu.DST_STRIDE: 4 * 128, cpu.WIDTH: packed.in_size, cpu.ROWS_INDEX: NUM_TOKENS,
        cpu.INDEX_PTR: tokens.data_ptr(),
    }, {NUM_TOKENS: 7})  # fmt: skip
    assert torch.equal(out[:, :70], table.to(DTYPES[dtype])[tokens.long()].float())
    assert bool((out[:, 70:] == 0).all())
