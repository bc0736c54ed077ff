"""write_kv for CUDA against the reference on split projections; interpreted where there is no GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.errors import EngineError
from polybatch.kernels.write_kv.cuda import rope_table, write_kv
from polybatch.kernels.write_kv.reference import write_kv as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=12, deadline=None)
@given(
    num_tokens=st.integers(0, 5),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (16, 2)]),
    dim=st.sampled_from([2, 24, 64]),
    page_size=st.sampled_from([4, 16]),
    bias=st.booleans(),
    qk_norm=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
def test_it_equals_the_reference_and_writes_nothing_for_padding(
    num_tokens, heads, dim, page_size, bias, qk_norm, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    (num_heads, kv_heads), num_pages = heads, 4
    width = (num_heads + 2 * kv_heads) * dim
    # Rows lie in a wider buffer and pages are longer than their keys and values, as in the engine.
    buffer = torch.randn(num_tokens, width + 8, generator=generator).to(dtype)
    qkv = buffer[:, :width].to(DEVICE)
    arena = torch.full(
        (num_pages, 2 * kv_heads * page_size * dim + 32), torch.nan, dtype=dtype, device=DEVICE
    )
    pages = arena[:, :-32].view(num_pages, 2, kv_heads, page_size, dim)
    slots = torch.randperm(num_pages * page_size, generator=generator)[:num_tokens].int()
    slots[::3] = -1
    positions = torch.randint(0, 90, (num_tokens,), generator=generator, dtype=torch.int32)
    positions[slots < 0] = 10**6
    inv_freq = 100.0 ** -(torch.arange(dim // 2) / (dim // 2))
    biases = torch.randn(width, generator=generator).to(dtype) if bias else None
    norms = torch.randn(2, dim, generator=generator).to(dtype)
    named = {"q_norm": norms[0], "k_norm": norms[1], "eps": 1e-6} if qk_norm else {}

    real = slots >= 0
    expected_pages = torch.full(pages.shape, torch.nan, dtype=dtype)
    whole = buffer[real, :width] if biases is None else buffer[real, :width] + biases
    q, k, v = whole.view(-1, num_heads + 2 * kv_heads, dim).split([num_heads, kv_heads, kv_heads], dim=1)
    expected = reference(
        q, k, v, positions[real], slots[real].long(), inv_freq, 1.2, expected_pages, **named
    )  # fmt: skip
    rotated = write_kv(
        qkv, positions.to(DEVICE), slots.to(DEVICE), rope_table(inv_freq, 1.2, 90).to(DEVICE), pages,
        bias=None if biases is None else biases.to(DEVICE),
        **{name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in named.items()},
    ).cpu()  # fmt: skip

    # The interpreter cuts bfloat16 off where a GPU rounds it.
    near = {"rtol": 4e-2, "atol": 4e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(rotated[real], expected, **near)
    torch.testing.assert_close(pages.cpu(), expected_pages, equal_nan=True, **near)
    assert arena[:, -32:].isnan().all()
    assert torch.equal(qkv.cpu()[~real], buffer[~real, :width])
    assert torch.equal(qkv.cpu()[:, num_heads * dim :], buffer[:, num_heads * dim : width])


def test_the_rotary_table_is_exact_to_float32_at_long_positions():
    inv_freq = 500000.0 ** -(torch.arange(64) / 64)
    table = rope_table(inv_freq, 1.0, 131072)
    for position in (0, 1, 16383, 16384, 131071):
        angles = (torch.tensor(float(position)) * inv_freq).double()
        expected = torch.cat((angles.cos(), angles.sin()))
        torch.testing.assert_close(table[position].double(), expected, rtol=0, atol=1.2e-7)


def test_shapes_that_disagree_are_refused():
    positions = torch.zeros(2, dtype=torch.int32)
    pages = torch.zeros(1, 2, 1, 4, 4)
    for width, dim in ((8, 4), (14, 4), (12, 6)):
        with pytest.raises(EngineError, match="write_kv got"):
            write_kv(torch.zeros(2, width), positions, positions, torch.zeros(9, dim), pages)
