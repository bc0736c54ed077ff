"""Compiled rotation and scatter, and attention over what they wrote, against the references."""

import math

import pytest
import torch
from cpu_operations import DTYPES, constant, int32, isa_params, nan_rows, run_operation
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.kernels.cpu.layout import NUM_RUNS, NUM_TILES, padded
from polybatch.kernels.ragged_attention import cpu as attention
from polybatch.kernels.ragged_attention import ragged_attention
from polybatch.kernels.write_kv import cpu, write_kv

BASE = math.log2(math.e)
SHAPES = [(4, 2, 40, "float32"), (3, 1, 24, "bfloat16")]


def run_both(shape, chunks, seed, isa, tile_rows=attention.TILE_ROWS, window=None):
    """Write chunks (context, new) of sequences to NaN-filled pages and attend; ours, then the reference's."""
    heads, kv_heads, dim, dtype = shape
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(context + new for context, new in chunks)
    counts = [-(-(context + new) // 16) for context, new in chunks]
    order = torch.randperm(sum(counts) + 2, generator=generator).tolist()
    table = torch.zeros(len(chunks), max(counts), dtype=torch.int32)
    q_size, kv_size = heads * dim, kv_heads * dim
    qkv = torch.randn(num_tokens, q_size + 2 * kv_size + 32, generator=generator)
    positions, slots, runs, tiles, new_rows = [], [], [], [], []
    group = heads // kv_heads
    for s, (context, new) in enumerate(chunks):
        first = len(positions)
        for j in range(counts[s]):
            page = order.pop()
            table[s, j] = page
            length = min(16, context + new - 16 * j)
            runs.append((first + 16 * j, length, page, 0))
            slots += range(16 * page, 16 * page + length)
        positions += range(context + new)
        new_rows += range(first + context, first + context + new)
        for r in range(0, new * group, tile_rows):
            tiles.append((s, r, min(tile_rows, new * group - r), first + context, context))
    inv_freq = 100.0 ** (-torch.arange(dim // 2) / (dim // 2))
    angles = torch.arange(max(positions) + 1)[:, None] * inv_freq
    cos_sin = constant(torch.stack((angles.cos(), angles.sin()), dim=1))
    item, stride = DTYPES[dtype].itemsize, heads * padded(dim, 16)
    page_bytes = kv_heads * cpu.head_bytes(dim, dtype)
    pages = nan_rows(sum(counts) + 2, page_bytes // item, dtype)
    q_out, out = nan_rows(num_tokens, stride, dtype), nan_rows(num_tokens, stride, dtype)
    at, run_table, tile_table = int32(positions), int32(runs), int32(tiles)
    scale = torch.tensor([BASE / math.sqrt(dim)]).view(torch.int32)
    run_operation(cpu.compile_write_kv(heads, kv_heads, dim, dtype, False, isa), {
        cpu.QKV: qkv.data_ptr(), cpu.QKV_STRIDE: 4 * qkv.shape[1], cpu.K_OFFSET: 4 * q_size,
        cpu.V_OFFSET: 4 * (q_size + kv_size), cpu.Q_OUT: q_out.data_ptr(), cpu.Q_OUT_STRIDE: item * stride,
        cpu.PAGES: pages.data_ptr(), cpu.PAGE_BYTES: page_bytes, cpu.RUNS: run_table.data_ptr(),
        cpu.COS_SIN: cos_sin.data_ptr(), cpu.POSITIONS: at.data_ptr(), cpu.Q_SCALE: int(scale),
    }, {NUM_RUNS: len(runs)})  # fmt: skip
    run_operation(attention.compile_attention(heads, kv_heads, dim, dtype, isa), {
        attention.Q_PTR: q_out.data_ptr(), attention.Q_STRIDE: item * stride,
        attention.OUT_PTR: out.data_ptr(), attention.OUT_STRIDE: item * stride,
        attention.PAGES: pages.data_ptr(), attention.PAGE_BYTES: page_bytes,
        attention.TILES: tile_table.data_ptr(), attention.PAGE_TABLE: table.data_ptr(),
        attention.TABLE_STRIDE: 4 * table.shape[1], attention.WINDOW: window or 0,
    }, {NUM_TILES: len(tiles)})  # fmt: skip
    q, k, v = (
        part.reshape(num_tokens, -1, dim) for part in qkv[:, :-32].split([q_size, kv_size, kv_size], dim=1)
    )
    kv_pages = torch.full((sum(counts) + 2, 2, kv_heads, 16, dim), torch.nan)
    turned = write_kv(q, k, v, at, torch.tensor(slots), inv_freq, 1.0, kv_pages)
    cu_tokens = int32([0, *(new for _, new in chunks)]).cumsum(0).int()
    kv_lens = int32([context + new for context, new in chunks])
    expected, _ = ragged_attention(
        turned[new_rows], kv_pages, table, cu_tokens, kv_lens, scale=dim**-0.5, window=window
    )
    shaped = (num_tokens, heads, padded(dim, 16))
    ours = (q_out.view(shaped), out.view(shaped)[new_rows])
    return *ours, turned * (BASE / math.sqrt(dim)), expected


chunk_lists = st.lists(st.tuples(st.integers(0, 80), st.integers(1, 20)), min_size=1, max_size=3)


@pytest.mark.parametrize("isa", isa_params())
@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=8, deadline=None)
@given(chunks=chunk_lists, window=st.one_of(st.none(), st.integers(1, 70)), seed=st.integers(0, 2**20))
def test_attention_over_written_pages_equals_the_references(shape, isa, chunks, window, seed):
    q, out, expected_q, expected = run_both(shape, chunks, seed, isa, window=window)
    dim = shape[2]
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if shape[3] == "float32" else {"rtol": 0.02, "atol": 0.04}
    torch.testing.assert_close(q[..., :dim].float(), expected_q, **tolerance)
    torch.testing.assert_close(out[..., :dim].float(), expected, **tolerance)
    assert bool((q[..., dim:] == 0).all())
    assert bool((out[..., dim:] == 0).all())


@pytest.mark.parametrize("isa", isa_params())
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_however_its_chunk_is_cut_into_tiles(shape, isa):
    whole = run_both(shape, [(50, 13), (0, 7)], 4, isa)[1]
    for tile_rows in (1, 2, 3, 5, 7, 8, 11):
        assert torch.equal(run_both(shape, [(50, 13), (0, 7)], 4, isa, tile_rows)[1], whole)
