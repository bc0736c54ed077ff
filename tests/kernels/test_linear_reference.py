"""Quantisers and integer linear layers against exact integer and float64 formulations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.errors import ConfigError
from polybatch.kernels.linear import (
    Int8Weight,
    dequantize,
    int4_linear,
    int8_linear,
    quantize_activations,
    quantize_int4,
    quantize_int8,
)

shapes = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 4))
seeds = st.integers(0, 2**20)


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=seeds)
def test_int8_rounds_to_the_nearest_of_255_levels_per_channel(shape, seed):
    _, num_out, groups = shape
    weight = torch.randn(num_out, 32 * groups, generator=torch.Generator().manual_seed(seed))
    quantised = quantize_int8(weight)
    assert int(quantised.values.abs().max()) == 127
    error = (dequantize(quantised) - weight).abs()
    assert bool((error <= quantised.scales[:, None] * 0.5001).all())


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=seeds)
def test_int4_rounds_to_the_nearest_level_of_its_group(shape, seed):
    _, num_out, groups = shape
    weight = torch.randn(num_out, 32 * groups, generator=torch.Generator().manual_seed(seed))
    quantised = quantize_int4(weight)
    error = (dequantize(quantised) - weight).abs().unflatten(1, (groups, 32))
    assert bool((error <= quantised.scales[..., None] * 0.5001 + 1e-6).all())


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=seeds)
def test_int4_recovers_a_weight_that_lies_on_16_levels(shape, seed):
    _, num_out, groups = shape
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 16, (num_out, groups, 32), generator=generator)
    levels[..., 0], levels[..., 1] = 0, 15
    scale = (torch.rand(num_out, groups, 1, generator=generator) * 0.1 + 1e-3).half().float()
    low = torch.randn(num_out, groups, 1, generator=generator).half().float()
    weight = (levels * scale + low).flatten(1)
    quantised = quantize_int4(weight)
    assert torch.equal(quantised.values.long(), levels.flatten(1))
    torch.testing.assert_close(dequantize(quantised), weight, rtol=1e-6, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(shape=shapes, power=st.integers(-4, 4), missing=st.integers(0, 31), seed=seeds)
def test_activations_round_half_to_even_per_token_and_group(shape, power, missing, seed):
    num_tokens, _, groups = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, 32 * groups - missing, generator=generator) * 10.0**power
    values, scales = quantize_activations(x)
    assert values.shape == (num_tokens, 32 * groups)
    assert scales.shape == (num_tokens, groups)
    assert bool((values.unflatten(1, (groups, 32)).abs().amax(dim=2) == 127).all())
    assert not values[:, x.shape[1] :].any()
    error = (unround(values, scales)[:, : x.shape[1]] - x).abs()
    assert bool((error <= scales.repeat_interleave(32, dim=1)[:, : x.shape[1]] * 0.5001).all())
    halves, _ = quantize_activations(torch.tensor([[127.0, 0.5, 1.5, -2.5]]))
    assert halves[:, :4].tolist() == [[127, 0, 2, -2]]


def test_no_rows_round_to_no_rows():
    values, scales = quantize_activations(torch.empty(0, 40))
    assert (values.shape, scales.shape) == ((0, 64), (0, 2))


def unround(values, scales):
    """The activations that the integers stand for, [T, padded in] float64."""
    return (values.double().unflatten(1, (-1, 32)) * scales.double()[..., None]).flatten(1)


@settings(max_examples=15, deadline=None)
@given(shape=shapes, missing=st.integers(0, 31), seed=seeds)
def test_integer_linears_equal_dequantised_weights_times_rounded_activations(shape, missing, seed):
    num_tokens, num_out, groups = shape
    generator = torch.Generator().manual_seed(seed)
    # Weights of 4 bits come in whole groups; those of 8 bits need not.
    for num_in, quantize, product in (
        (32 * groups - missing, quantize_int8, int8_linear),
        (32 * groups, quantize_int4, int4_linear),
    ):
        weight = quantize(torch.randn(num_out, num_in, generator=generator))
        x = torch.randn(num_tokens, num_in, generator=generator)
        rounded = unround(*quantize_activations(x))[:, :num_in]
        expected = rounded @ dequantize(weight).double().T
        torch.testing.assert_close(product(x, weight).double(), expected, rtol=1e-4, atol=1e-4)


def test_int8_linear_sums_integers_exactly():
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-127, 128, (3, 4096), generator=generator, dtype=torch.int8)
    x = torch.randint(-127, 128, (2, 4096), generator=generator).float()
    # The largest of every group, so that its scale is 1 and nothing is rounded.
    x[:, ::32] = 127.0
    exact = [[sum(int(a) * int(b) for a, b in zip(row, w, strict=True)) for w in values] for row in x]
    assert int8_linear(x, Int8Weight(values, torch.ones(3))).tolist() == torch.tensor(exact).float().tolist()


@settings(max_examples=10, deadline=None)
@given(num_tokens=st.integers(2, 9), seed=seeds)
def test_integer_linears_give_a_row_the_same_bits_in_any_batch(num_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(17, 64, generator=generator)
    x = torch.randn(num_tokens, 64, generator=generator)
    int8 = quantize_int8(weight)
    whole = int8_linear(x, int8)
    for t in range(num_tokens):
        assert torch.equal(int8_linear(x[t : t + 1], int8)[0], whole[t])


@pytest.mark.parametrize("value", [0.0, 1e-36, -2.5])
def test_constant_weights_and_activations_stay_finite(value):
    weight = torch.full((2, 32), value)
    x = torch.full((1, 32), value)
    for quantised, product in (
        (quantize_int8(weight), int8_linear),
        (quantize_int4(weight), int4_linear),
    ):
        torch.testing.assert_close(dequantize(quantised), weight)
        torch.testing.assert_close(product(x, quantised), x @ weight.T)


def test_int4_refuses_inputs_that_are_no_multiple_of_the_group():
    with pytest.raises(ConfigError, match=r"groups of 32 inputs.*has 48"):
        quantize_int4(torch.zeros(4, 48))
