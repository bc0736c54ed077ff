"""ragged_attention reference against a float64 loop over single scores, on shuffled NaN-filled pages."""

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.kernels.ragged_attention import merge_states, ragged_attention


def ragged_case(chunks, heads, page_size, dim, seed, dtype=torch.float32):
    """chunks: (context, new) per sequence. Keys and values lie in shuffled pages; the rest is NaN."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    kv_lens = [context + new for context, new in chunks]
    counts = [-(-n // page_size) for n in kv_lens]
    num_pages = sum(counts) + 2
    pages = torch.full((num_pages, 2, num_kv_heads, page_size, dim), torch.nan, dtype=dtype)
    order = torch.randperm(num_pages, generator=generator).tolist()
    # Entries beyond a sequence's own pages point outside the pool: following one is an error.
    table = torch.full((len(chunks), max(counts) + 1), 10**6, dtype=torch.int32)
    dense = []
    for s, kv_len in enumerate(kv_lens):
        kv = torch.randn(2, num_kv_heads, kv_len, dim, generator=generator).to(dtype)
        dense.append(kv)
        for j in range(counts[s]):
            page = order.pop()
            table[s, j] = page
            part = kv[:, :, j * page_size : (j + 1) * page_size]
            pages[page, :, :, : part.shape[2]] = part
    news = [new for _, new in chunks]
    cu_tokens = torch.tensor([0, *news]).cumsum(0).int()
    q = torch.randn(sum(news), num_heads, dim, generator=generator).to(dtype)
    return q, pages, table, cu_tokens, torch.tensor(kv_lens, dtype=torch.int32), dense


def naive(q, dense, cu_tokens, kv_lens, scale, window=None, ranges=None):
    """One score at a time, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    for s, kv in enumerate(dense):
        keys, values = kv.double()
        group = q.shape[1] // keys.shape[0]
        first = int(kv_lens[s]) - int(cu_tokens[s + 1] - cu_tokens[s])
        for row in range(int(cu_tokens[s]), int(cu_tokens[s + 1])):
            position = first + row - int(cu_tokens[s])
            low = 0 if window is None else max(0, position - window + 1)
            high = position + 1
            if ranges is not None:
                low, high = max(low, int(ranges[s, 0])), min(high, int(ranges[s, 1]))
            if low >= high:
                continue
            for h in range(q.shape[1]):
                scores = keys[h // group, low:high] @ q[row, h].double() * scale
                lse[row, h] = torch.logsumexp(scores, 0)
                out[row, h] = torch.softmax(scores, 0) @ values[h // group, low:high]
    return out, lse


chunk_lists = st.lists(st.tuples(st.integers(0, 19), st.integers(1, 9)), min_size=1, max_size=4)
head_counts = st.sampled_from([(1, 1), (3, 1), (4, 2), (2, 2)])


@settings(max_examples=25, deadline=None)
@given(
    chunks=chunk_lists,
    heads=head_counts,
    page_size=st.sampled_from([1, 4, 16]),
    dim=st.sampled_from([2, 6, 16]),
    window=st.one_of(st.none(), st.integers(1, 12)),
    seed=st.integers(0, 2**20),
)
def test_ragged_attention_equals_single_scores(chunks, heads, page_size, dim, window, seed):
    q, pages, table, cu_tokens, kv_lens, dense = ragged_case(chunks, heads, page_size, dim, seed)
    out, lse = ragged_attention(q, pages, table, cu_tokens, kv_lens, scale=dim**-0.5, window=window)
    expected, expected_lse = naive(q, dense, cu_tokens, kv_lens, dim**-0.5, window)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    chunks=chunk_lists,
    heads=head_counts,
    cuts=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    window=st.one_of(st.none(), st.integers(1, 12)),
    seed=st.integers(0, 2**20),
)
def test_merged_ranges_equal_the_whole(chunks, heads, cuts, window, seed):
    q, pages, table, cu_tokens, kv_lens, dense = ragged_case(chunks, heads, 4, 8, seed)
    edges = [0, *sorted(cuts), 10**6]
    parts = []
    for low, high in itertools.pairwise(edges):
        ranges = torch.tensor([[low, high]] * len(chunks), dtype=torch.int32)
        part = ragged_attention(
            q, pages, table, cu_tokens, kv_lens, scale=0.3, window=window, context_range=ranges
        )
        expected, expected_lse = naive(q, dense, cu_tokens, kv_lens, 0.3, window, ranges)
        torch.testing.assert_close(part[0].double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(part[1].double(), expected_lse, rtol=1e-4, atol=1e-5)
        parts.append(part)
    merged, merged_lse = merge_states([out for out, _ in parts], [lse for _, lse in parts])
    out, lse = ragged_attention(q, pages, table, cu_tokens, kv_lens, scale=0.3, window=window)
    torch.testing.assert_close(merged, out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged_lse, lse, rtol=1e-5, atol=1e-6)


def test_ranges_may_differ_between_sequences():
    q, pages, table, cu_tokens, kv_lens, dense = ragged_case([(9, 2), (0, 5), (14, 1)], (4, 2), 4, 8, 5)
    ranges = torch.tensor([[0, 3], [2, 4], [15, 40]], dtype=torch.int32)
    out, lse = ragged_attention(q, pages, table, cu_tokens, kv_lens, scale=0.4, context_range=ranges)
    expected, expected_lse = naive(q, dense, cu_tokens, kv_lens, 0.4, ranges=ranges)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.isinf(lse), torch.isinf(expected_lse))
    assert bool((out[2:4] == 0).all())


def test_pages_behind_the_window_are_never_read():
    q, pages, table, cu_tokens, kv_lens, _ = ragged_case([(23, 2)], (2, 1), 4, 8, 7)
    whole, _ = ragged_attention(q, pages, table, cu_tokens, kv_lens, scale=1.0, window=6)
    pages[table[0, :4].long()] = torch.nan
    table[0, :4] = 10**6
    freed, _ = ragged_attention(q, pages, table, cu_tokens, kv_lens, scale=1.0, window=6)
    assert torch.equal(whole, freed)
    assert bool(torch.isfinite(freed).all())


def test_float64_accumulation_agrees_with_single_scores_to_float64():
    q, pages, table, cu_tokens, kv_lens, dense = ragged_case([(12, 3), (0, 4)], (4, 2), 4, 8, 9)
    out, lse = ragged_attention(q, pages, table, cu_tokens, kv_lens, scale=0.35, accumulate=torch.float64)
    expected, expected_lse = naive(q, dense, cu_tokens, kv_lens, 0.35)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


def test_bfloat16_pages_are_attended_in_float32():
    q, pages, table, cu_tokens, kv_lens, dense = ragged_case([(7, 2)], (2, 2), 4, 8, 11, dtype=torch.bfloat16)
    out, lse = ragged_attention(q, pages, table, cu_tokens, kv_lens, scale=0.35)
    assert out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(
        out.double(), naive(q, dense, cu_tokens, kv_lens, 0.35)[0], rtol=1e-5, atol=1e-5
    )
