"""Low-precision linears for CUDA against float64, at odd shapes; interpreted where there is no GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from polybatch.errors import ConfigError, EngineError
from polybatch.kernels.gluon import runs_hopper_kernels
from polybatch.kernels.linear import cuda
from polybatch.kernels.linear.cuda import Fp8Linear, Int4Linear, LinearWorkspace, pack
from polybatch.kernels.linear.cuda_config import Int4Config, int4_config
from polybatch.kernels.linear.cuda_pack import pack_int4
from polybatch.kernels.linear.quantize_symmetric import (
    QuantizedTensor,
    concatenate,
    dequantize_symmetric,
    quantize_fp8,
    quantize_int4_symmetric,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_HOPPER = runs_hopper_kernels()
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True, scope="module")
def loop_bounds_of_one_element() -> Any:
    """Triton 3.6 interprets a scalar as an array of one element; NumPy 2.4 takes that as no index."""
    patch = interpreter._patch_lang_tensor

    def with_item(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_item)
        yield


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_int4(seed: int, out: int, inputs: int, group: int | None, zeros: bool) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    size = inputs if group is None else group
    groups = -(-inputs // size)
    return QuantizedTensor(
        "int4",
        torch.randint(0, 16, (out, inputs), generator=generator, dtype=torch.uint8),
        (torch.rand(out, groups, generator=generator) + 0.5).half(),
        torch.randint(0, 17, (out, groups), generator=generator, dtype=torch.uint8) if zeros else None,
        size,
    )


def workspace(dtype: torch.dtype = torch.bfloat16, max_tokens: int = 64) -> LinearWorkspace:
    return LinearWorkspace(DEVICE, dtype, max_tokens)


def poisoned(tokens: int, out: int, dtype: torch.dtype) -> torch.Tensor:
    """A view into a wider buffer, as the executor has it, all NaN."""
    return torch.full((tokens, out + 16), float("nan"), dtype=dtype, device=DEVICE)[:, 8 : 8 + out]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double().cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "out", "inputs", "group", "zeros"),
    [
        (1, 130, 256, 128, False),
        (5, 64, 384, 128, True),
        (17, 200, 200, 128, False),
        (3, 40, 520, None, False),
        (2, 16, 72, None, True),
        (4, 72, 1024, 256, True),
    ],
)
def test_int4_equals_the_dequantised_product(
    tokens: int, out: int, inputs: int, group: int | None, zeros: bool, dtype: torch.dtype
) -> None:
    weight = random_int4(tokens, out, inputs, group, zeros)
    x = draw(1, tokens, inputs, dtype=dtype)
    expected = x.double() @ dequantize_symmetric(weight).double().T
    linear = pack(weight, "int4", workspace(dtype))
    result = poisoned(tokens, out, dtype)
    linear.forward(x.to(DEVICE), result)
    assert relative_error(result, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("block_m", "block_out", "split"), [*((8, 32, split) for split in (1, 2, 3, 5)), (16, 64, 3), (32, 64, 2)]
)
def test_int4_is_the_same_for_any_cut_of_the_inputs(block_m: int, block_out: int, split: int) -> None:
    weight = random_int4(3, 128, 1304, None, False)
    x = draw(2, 33, 1304, dtype=torch.bfloat16)
    expected = x.double() @ dequantize_symmetric(weight).double().T
    linear = Int4Linear(pack_int4(weight.to(DEVICE)), workspace())
    config = Int4Config(block_m, block_out, split, 4, 2)
    linear.reserve([(33, config)])
    for _ in range(2):  # The counters must be zero again after a launch.
        result = poisoned(33, 128, torch.bfloat16)
        linear.forward_fused(x.to(DEVICE), result, config)
        assert relative_error(result, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(("group", "zeros"), [(128, True), (128, False), (256, True), (None, False)])
@pytest.mark.parametrize("split", [1, 3, 10])
def test_int4_is_the_same_with_scaled_weights_and_shorter_steps(
    group: int | None, zeros: bool, split: int
) -> None:
    inputs = 1280 if group == 256 else 1304
    weight = random_int4(6, 200, inputs, group, zeros)
    x = draw(3, 20, inputs, dtype=torch.bfloat16)
    expected = x.double() @ dequantize_symmetric(weight).double().T
    linear = Int4Linear(pack_int4(weight.to(DEVICE)), workspace())
    config = Int4Config(16, 256, split, 4, 2, is_scaled=True)
    linear.reserve([(20, config)])
    result = poisoned(20, 200, torch.bfloat16)
    linear.forward_fused(x.to(DEVICE), result, config)
    assert relative_error(result, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.skipif(not HAS_HOPPER, reason="the kernel is for Hopper GPUs")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "config"),
    [
        (17, Int4Config(32, 64, 4, 4, 2, True, True)),
        (33, Int4Config(64, 128, 1, 4, 2, True, True)),
        (64, Int4Config(64, 64, 3, 4, 3, True, True)),
        (130, Int4Config(128, 256, 2, 16, 2, True, True)),
    ],
)
def test_hoppers_int4_kernel_gives_the_dequantised_product_bit_for_bit_the_same_each_time(
    tokens: int, config: Int4Config, dtype: torch.dtype
) -> None:
    weight = random_int4(14, 200, 1304, 128, False)
    x = draw(15, tokens, 1304, dtype=dtype)
    expected = x.double() @ dequantize_symmetric(weight).double().T
    linear = Int4Linear(pack_int4(weight.to(DEVICE)), workspace(dtype, 256))
    linear.reserve([(tokens, config)])
    results = [poisoned(tokens, 200, dtype) for _ in range(3)]
    for result in results:  # The counters must be zero again after a launch.
        linear.forward_fused(x.to(DEVICE), result, config)
        assert relative_error(result, expected) < TOLERANCE[dtype]
        assert torch.equal(result, results[0])


@pytest.mark.skipif(not HAS_HOPPER, reason="the kernel is for Hopper GPUs")
@pytest.mark.parametrize("tokens", [33, 100, 700])
def test_rows_behind_the_last_token_change_nothing(tokens: int) -> None:
    weight = random_int4(18, 384, 512, 128, False)
    linear = pack(weight, "int4", workspace(max_tokens=1024))
    rows = draw(19, 1024, 512, dtype=torch.bfloat16).to(DEVICE)
    rows[tokens:] = torch.nan
    alone, among = (poisoned(tokens, 384, torch.bfloat16) for _ in range(2))
    linear.forward(rows[:tokens].clone(), alone)
    linear.forward(rows[:tokens], among)
    expected = rows[:tokens].double().cpu() @ dequantize_symmetric(weight).double().T
    assert relative_error(alone, expected) < TOLERANCE[torch.bfloat16]
    assert torch.equal(alone, among)


def test_rows_that_begin_between_16_byte_boundaries_are_multiplied_too() -> None:
    weight = random_int4(16, 128, 256, 128, False)
    x = draw(17, 40, 259, dtype=torch.bfloat16).to(DEVICE)[:, 3:]
    result = poisoned(40, 128, torch.bfloat16)
    pack(weight, "int4", workspace()).forward(x, result)
    expected = x.double().cpu() @ dequantize_symmetric(weight).double().T
    assert relative_error(result, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(("group", "zeros"), [(128, True), (None, False)])
def test_widening_for_prefill_computes_the_same(
    group: int | None, zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "SCRATCH_BYTES", 128 * 264 * 2)
    monkeypatch.setattr(cuda, "FUSED_TOKENS", 4)
    weight = random_int4(4, 300, 264, group, zeros)
    x = draw(3, 9, 264, dtype=torch.float16)
    result = poisoned(9, 300, torch.float16)
    pack(weight, "int4", workspace(torch.float16)).forward(x.to(DEVICE), result)
    assert relative_error(result, x.double() @ dequantize_symmetric(weight).double().T) < 2e-3


@settings(max_examples=15, deadline=None)
@given(
    out=st.integers(1, 20),
    groups=st.integers(1, 3),
    short=st.integers(0, 15),
    power=st.integers(-12, 12),
    seed=st.integers(0, 2**20),
)
def test_rounding_to_int4_moves_no_weight_by_more_than_half_a_level(
    out: int, groups: int, short: int, power: int, seed: int
) -> None:
    weight = draw(seed, out, 128 * groups - 8 * short) * 10.0**power
    quantised = quantize_int4_symmetric(weight)
    error = (dequantize_symmetric(quantised) - weight).abs()
    step = quantised.scales.float().repeat_interleave(128, dim=1)[:, : weight.shape[1]]
    # Rounding the scale to bfloat16 may clip an end by up to 8 * 2^-8 of a level.
    assert bool((error <= step * 0.54).all())
    whole = quantize_int4_symmetric(weight, None)
    assert whole.is_per_channel
    assert whole.scales.shape == (out, 1)


def test_weights_of_zeros_stay_zero() -> None:
    zeros = torch.zeros(3, 128)
    assert not dequantize_symmetric(quantize_int4_symmetric(zeros)).any()
    assert not dequantize_symmetric(quantize_fp8(zeros)).any()


@pytest.mark.parametrize("scheme", ["int4", "int4-channel"])
def test_float_weights_are_rounded_when_packed(scheme: str) -> None:
    weight, x = draw(5, 48, 256), draw(6, 4, 256, dtype=torch.bfloat16)
    result = poisoned(4, 48, torch.bfloat16)
    linear = pack(weight, scheme, workspace())
    linear.forward(x.to(DEVICE), result)
    rounded = quantize_int4_symmetric(weight, None if scheme == "int4-channel" else 128)
    assert relative_error(result, x.double() @ dequantize_symmetric(rounded).double().T) < 8e-3
    assert relative_error(result, x.double() @ weight.double().T) < 0.25


def test_scales_that_float16_cannot_hold_are_kept_in_bfloat16() -> None:
    weight = draw(7, 32, 256) * 1e-6
    x = draw(8, 2, 256, dtype=torch.bfloat16)
    layout = pack_int4(quantize_int4_symmetric(weight))
    assert layout.scales_bf16
    result = poisoned(2, 32, torch.bfloat16)
    pack(weight, "int4", workspace()).forward(x.to(DEVICE), result)
    rounded = dequantize_symmetric(quantize_int4_symmetric(weight)).double()
    assert relative_error(result, x.double() @ rounded.T) < 8e-3


def test_stacked_weights_give_their_outputs_side_by_side() -> None:
    parts = [random_int4(seed, out, 256, 128, seed == 1) for seed, out in enumerate((64, 24, 24))]
    x = draw(9, 3, 256, dtype=torch.float16)
    result = poisoned(3, 112, torch.float16)
    pack(concatenate(parts), "int4", workspace(torch.float16)).forward(x.to(DEVICE), result)
    expected = torch.cat([x.double() @ dequantize_symmetric(p).double().T for p in parts], dim=1)
    assert relative_error(result, expected) < 1e-3


def test_int4_takes_little_more_than_half_a_byte_per_weight() -> None:
    linear = pack(draw(10, 128, 1024), "int4", workspace())
    assert linear.num_bytes == 128 * 1024 // 2 + 5 * 128 * 4


def test_unquantised_weights_share_the_face() -> None:
    weight, x = draw(11, 40, 64), draw(12, 5, 64)
    result = poisoned(5, 40, torch.float32)
    pack(weight, None, workspace(torch.float32)).forward(x.to(DEVICE), result)
    assert relative_error(result, x.double() @ weight.double().T) < 1e-5


@settings(max_examples=10, deadline=None)
@given(tokens=st.integers(1, 5), inputs=st.integers(1, 9), power=st.integers(-3, 3), seed=st.integers(0, 999))
def test_fp8_activations_keep_three_bits_of_mantissa(tokens: int, inputs: int, power: int, seed: int) -> None:
    x = (draw(seed, tokens, 16 * inputs) * 10.0**power).bfloat16()
    linear = Fp8Linear(quantize_fp8(draw(0, 16, 16 * inputs)).to(DEVICE), workspace())
    values, scales = (t.float().cpu() for t in linear.quantize(x.to(DEVICE)))
    torch.testing.assert_close(scales[:, 0], x.float().abs().amax(dim=1) / 448, rtol=1e-5, atol=0)
    if INTERPRETED:  # Triton 3.6 interprets rounding up to a power of two wrongly.
        return
    error = (values * scales - x.float()).abs()
    # Half of the last bit, or of the smallest step of e4m3, 2^-9.
    assert bool((error <= (x.float().abs() * 2**-4).maximum(scales * 2**-10) * 1.001).all())


def test_fp8_equals_the_product_of_what_it_rounded() -> None:
    if DEVICE == "cpu":
        pytest.skip("torch's scaled product by rows is tested on a GPU")
    weight, x = draw(13, 96, 272), draw(14, 7, 272, dtype=torch.bfloat16)
    linear = pack(weight, "fp8", workspace())
    result = poisoned(7, 96, torch.bfloat16)
    linear.forward(x.to(DEVICE), result)
    assert isinstance(linear, Fp8Linear)
    values, scales = linear.quantize(x.to(DEVICE))
    rounded = dequantize_symmetric(quantize_fp8(weight)).double()
    assert relative_error(result, (values.float() * scales).double().cpu() @ rounded.T) < 8e-3


@pytest.mark.parametrize(
    ("scheme", "dtype", "shape", "complaint"),
    [
        ("int3", torch.bfloat16, (8, 128), "must be one of None, int4"),
        ("int4", torch.float32, (8, 128), "needs dtype bfloat16 or float16"),
        ("int4", torch.bfloat16, (8, 132), "132 inputs; the CUDA kernel needs a multiple of 8"),
        ("fp8", torch.float16, (16, 128), "needs dtype bfloat16"),
        ("fp8", torch.bfloat16, (24, 128), "multiples of 16"),
    ],
)
def test_what_the_kernels_do_not_know_is_refused(
    scheme: str, dtype: torch.dtype, shape: tuple[int, int], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        pack(torch.ones(shape), scheme, workspace(dtype))


def test_small_groups_and_other_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="groups of 32 inputs"):
        pack(random_int4(0, 8, 128, 32, False), "int4", workspace())
    with pytest.raises(ConfigError, match="the checkpoint's weights are int4"):
        pack(random_int4(0, 16, 128, 128, False), "fp8", workspace())


def test_forward_refuses_tensors_that_do_not_fit() -> None:
    linear = pack(torch.ones(8, 128), "int4", workspace(max_tokens=4))
    x = torch.ones(5, 128, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(EngineError, match="5 tokens; its workspace holds 4"):
        linear.forward(x, poisoned(5, 8, torch.bfloat16))
    with pytest.raises(EngineError, match="got x"):
        linear.forward(x[:2, :64], poisoned(2, 8, torch.bfloat16))


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.integers(1, 2048),
    rows=st.integers(1, 300),
    k_tiles=st.integers(1, 120),
    is_hopper=st.booleans(),
)
def test_every_program_of_a_configuration_has_inputs(
    tokens: int, rows: int, k_tiles: int, is_hopper: bool
) -> None:
    config = int4_config(tokens, rows * 128, k_tiles, is_hopper)
    assert 1 <= config.split <= k_tiles
    assert (rows * 128) % config.block_out == 0
    assert (config.parts_at_a_time == 0) == (config.split == 1)
    assert is_hopper or not config.is_hopper


@pytest.mark.parametrize("tokens", [33, 64, 128, 512, 2048])
@pytest.mark.parametrize(("rows", "k_tiles"), [(6144, 16), (4096, 16), (28672, 16), (4096, 56), (384, 3)])
def test_hoppers_buffers_fit_into_shared_memory(tokens: int, rows: int, k_tiles: int) -> None:
    config = int4_config(tokens, rows, k_tiles, is_hopper=True)
    if config.is_hopper:
        words, x = config.block_out * 64 * 2, config.block_m * 256 * 2
        assert config.num_stages * (words + x + 8) <= 232_448
