"""write_kv reference against rotation by complex numbers and one slot at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.errors import EngineError
from polybatch.kernels.write_kv import write_kv


def complex_rotation(x, positions, inv_freq, scaling):
    """x: [T, heads, D], pairs (i, i + D / 2) as complex numbers, in float64."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    angles = positions.double()[:, None] * inv_freq.double()
    turned = pairs * torch.polar(torch.full_like(angles, scaling), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def head_norm(x, weight, eps):
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(0, 9),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    half=st.integers(1, 8),
    page_size=st.sampled_from([1, 4, 16]),
    qk_norm=st.booleans(),
    scaling=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 2**20),
)
def test_write_kv_rotates_and_fills_exactly_its_slots(
    num_tokens, heads, half, page_size, qk_norm, scaling, seed
):
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    dim, num_pages = 2 * half, 1 + 12 // page_size
    q = torch.randn(num_tokens, num_heads, dim, generator=generator)
    k, v = torch.randn(2, num_tokens, num_kv_heads, dim, generator=generator)
    q_before, k_before = q.clone(), k.clone()
    positions = torch.randint(0, 500, (num_tokens,), generator=generator, dtype=torch.int32)
    inv_freq = 100.0 ** -(torch.arange(half) / half)
    slots = torch.randperm(num_pages * page_size, generator=generator)[:num_tokens]
    weights = torch.randn(2, dim, generator=generator)
    norms = {"q_norm": weights[0], "k_norm": weights[1], "eps": 1e-6} if qk_norm else {}
    pages = torch.full((num_pages, 2, num_kv_heads, page_size, dim), torch.nan)
    rotated = write_kv(q, k, v, positions, slots, inv_freq, scaling, pages, **norms)

    if qk_norm:
        q_expected, k_expected = head_norm(q, weights[0], 1e-6), head_norm(k, weights[1], 1e-6)
    else:
        q_expected, k_expected = q, k
    q_expected = complex_rotation(q_expected, positions, inv_freq, scaling)
    k_expected = complex_rotation(k_expected, positions, inv_freq, scaling)
    torch.testing.assert_close(rotated.double(), q_expected, rtol=1e-4, atol=2e-4)
    assert torch.equal(q, q_before)
    assert torch.equal(k, k_before)
    filled = torch.zeros(num_pages, page_size, dtype=torch.bool)
    for t, slot in enumerate(slots.tolist()):
        page, offset = divmod(slot, page_size)
        filled[page, offset] = True
        torch.testing.assert_close(pages[page, 0, :, offset].double(), k_expected[t], rtol=1e-4, atol=2e-4)
        assert torch.equal(pages[page, 1, :, offset], v[t])
    written = ~pages.isnan()
    assert torch.equal(written, filled[:, None, None, :, None].expand_as(written))


def test_pages_keep_their_own_dtype():
    pages = torch.zeros(2, 2, 1, 4, 4, dtype=torch.bfloat16)
    q = torch.randn(1, 2, 4)
    k, v = torch.randn(2, 1, 1, 4)
    position = torch.zeros(1, dtype=torch.int32)
    rotated = write_kv(q, k, v, position, torch.tensor([5]), torch.ones(2), 1.0, pages)
    assert rotated.dtype == torch.float32
    assert torch.equal(pages[1, 0, 0, 1], k[0, 0].bfloat16())


def test_shapes_that_disagree_are_refused():
    x = torch.zeros(2, 1, 4)
    position = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(EngineError, match="write_kv got"):
        write_kv(x, x, x[:1], position, torch.arange(2), torch.ones(2), 1.0, torch.zeros(1, 2, 1, 4, 4))
