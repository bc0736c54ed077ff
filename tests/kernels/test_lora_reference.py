"""lora reference against one matrix product per token, on ragged segments and scattered rows."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.kernels.lora import AdapterTable, lora


def scattered(ranks, num_in, num_out, generator, dtype=torch.float32, dense=False):
    """Random adapters with their rows in shuffled places of a NaN-filled memory."""
    total = sum(ranks)
    width = max(num_in, num_out)
    memory = torch.full(((2 * total + 3) * width,), torch.nan, dtype=dtype)
    places = torch.randperm(2 * total + 3, generator=generator)[: 2 * total] * width
    a_rows, b_rows = places[:total], places[total:]
    a = torch.randn(total, num_in, generator=generator).to(dtype)
    b = torch.randn(total, num_out, generator=generator).to(dtype)
    for r in range(total):
        memory[a_rows[r] : a_rows[r] + num_in] = a[r]
        memory[b_rows[r] : b_rows[r] + num_out] = b[r]
    bounds = torch.tensor([0, *ranks]).cumsum(0)
    gain = torch.randn(len(ranks), num_out, generator=generator) if dense else None
    bias = torch.randn(len(ranks), num_out, generator=generator) if dense else None
    return memory, AdapterTable(bounds, a_rows, b_rows, gain, bias), a, b


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.sampled_from([0, 1, 3, 17]), min_size=1, max_size=4),
    lengths=st.lists(st.tuples(st.integers(1, 5), st.integers(-1, 3)), min_size=1, max_size=6),
    shape=st.tuples(st.integers(1, 13), st.integers(1, 11)),
    dense=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_each_token_gets_its_own_adapter_and_no_other(ranks, lengths, shape, dense, seed):
    generator = torch.Generator().manual_seed(seed)
    num_in, num_out = shape
    memory, table, a, b = scattered(ranks, num_in, num_out, generator, dense=dense)
    owners = [n if n < len(ranks) else -1 for length, n in lengths for _ in range(length)]
    segments, at = [], 0
    for length, n in lengths:
        if 0 <= n < len(ranks):
            segments.append([at, at + length, n])
        at += length
    x = torch.randn(at, num_in, generator=generator)
    base = torch.randn(at, num_out, generator=generator)
    y = base.clone()
    lora(x, y, memory, torch.tensor(segments, dtype=torch.int32).reshape(-1, 3), table)
    for t, n in enumerate(owners):
        if n < 0:
            assert torch.equal(y[t], base[t])
            continue
        rows = slice(int(table.row_bounds[n]), int(table.row_bounds[n + 1]))
        delta = (b[rows].double().T @ a[rows].double()) @ x[t].double()
        expected = base[t].double() + delta
        if dense:
            expected = table.gain[n] * expected + table.bias[n]
        torch.testing.assert_close(y[t], expected.float(), rtol=1e-4, atol=1e-4)


def test_result_is_rounded_once_to_the_dtype_of_y():
    generator = torch.Generator().manual_seed(3)
    memory, table, a, b = scattered([4], 8, 6, generator, dtype=torch.bfloat16)
    x = torch.randn(5, 8, generator=generator).bfloat16()
    y = torch.randn(5, 6, generator=generator).bfloat16()
    expected = (y.float() + x.float() @ a.float().T @ b.float()).bfloat16()
    lora(x, y, memory, torch.tensor([[0, 5, 0]]), table)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
