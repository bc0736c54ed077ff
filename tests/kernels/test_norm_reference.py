"""rms_norm reference against a float64 formulation, row by row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.kernels.norm import rms_norm


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(0, 7), width=st.integers(1, 70), power=st.integers(-3, 3), seed=st.integers(0, 2**20))
def test_rms_norm_equals_its_definition_in_float64(rows, width, power, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * 10.0**power
    weight = torch.randn(width, generator=generator)
    got = rms_norm(x, weight, 1e-6)
    for r in range(rows):
        row = x[r].double()
        expected = row / ((row @ row) / width + 1e-6) ** 0.5 * weight.double()
        torch.testing.assert_close(got[r].double(), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_keeps_the_dtype_and_the_leading_axes():
    x = torch.randn(2, 3, 8).bfloat16()
    got = rms_norm(x, torch.ones(8).bfloat16(), 1e-5)
    assert got.dtype == torch.bfloat16
    assert got.shape == x.shape
    torch.testing.assert_close(got[1, 2], rms_norm(x[1, 2:3], torch.ones(8).bfloat16(), 1e-5)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_zeros_stays_zero(dtype):
    assert torch.equal(rms_norm(torch.zeros(1, 4, dtype=dtype), torch.ones(4, dtype=dtype), 1e-5),
                       torch.zeros(1, 4, dtype=dtype))  # fmt: skip
