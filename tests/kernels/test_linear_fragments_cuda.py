"""4-bit linears over weights in fragment order: interpreted at odd shapes, and compiled for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.errors import EngineError
from polybatch.kernels.linear import cuda_fragment_linear
from polybatch.kernels.linear.cuda_fragment_config import FragmentConfig, fragment_config
from polybatch.kernels.linear.cuda_fragment_linear import FragmentLinear
from polybatch.kernels.linear.cuda_pack import pack_fragments
from polybatch.kernels.linear.quantize_symmetric import QuantizedTensor, dequantize_symmetric
from tests.kernels.test_linear_cuda import (  # noqa: F401 - a fixture
    DEVICE,
    draw,
    loop_bounds_of_one_element,
    poisoned,
    random_int4,
    relative_error,
    workspace,
)

TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


def fragments(weight: QuantizedTensor, dtype: torch.dtype = torch.bfloat16) -> FragmentLinear:
    return FragmentLinear(pack_fragments(weight.to(DEVICE)), workspace(dtype))


@settings(max_examples=20, deadline=None)
@given(out=st.integers(1, 140), eighths=st.integers(1, 40), seed=st.integers(0, 2**20))
def test_every_value_lies_where_its_thread_looks_for_it(out: int, eighths: int, seed: int) -> None:
    weight = random_int4(seed, out, 8 * eighths, 128, False)
    words = pack_fragments(weight).words.flatten()
    picked = torch.Generator().manual_seed(seed)
    for _ in range(20):
        row = int(torch.randint(out, (1,), generator=picked))
        column = int(torch.randint(8 * eighths, (1,), generator=picked))
        tile, plane, pair, half = column // 128, column % 128 // 32, column % 32 // 2, column % 2
        rows = -(-out // 128) * 128
        block = (tile * rows // 16 + row // 16) * 2 + pair // 8
        thread = 4 * (row % 8) + pair % 4
        place = (block * 32 + thread) * 4 + 2 * (pair // 4 % 2) + row // 8 % 2
        value = int(words[place]) >> (16 * half + 4 * plane) & 15
        assert value == int(weight.values[row, column])


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
def test_the_product_is_that_of_the_dequantised_matrix(
    tokens: int, out: int, inputs: int, group: int | None, zeros: bool, dtype: torch.dtype
) -> None:
    weight = random_int4(tokens, out, inputs, group, zeros)
    x = draw(1, tokens, inputs, dtype=dtype)
    expected = x.double() @ dequantize_symmetric(weight).double().T
    result = poisoned(tokens, out, dtype)
    fragments(weight, dtype).forward(x.to(DEVICE), result)
    assert relative_error(result, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(("split", "ahead"), [(1, 1), (2, 3), (3, 2), (5, 4)])
@pytest.mark.parametrize(
    ("group", "zeros", "scaled"), [(128, True, True), (128, False, False), (None, False, True)]
)
def test_the_product_is_the_same_for_any_cut(
    split: int, ahead: int, group: int | None, zeros: bool, scaled: bool
) -> None:
    weight = random_int4(3, 128, 1304, group, zeros)
    x = draw(2, 33, 1304, dtype=torch.bfloat16)
    expected = x.double() @ dequantize_symmetric(weight).double().T
    linear = fragments(weight)
    config = FragmentConfig(16, 64, split, 4, 2, ahead, is_scaled=scaled)
    linear.reserve([(33, config)])
    for _ in range(2):  # The counters must be zero again after a launch.
        result = poisoned(33, 128, torch.bfloat16)
        linear.forward_fused(x.to(DEVICE), result, config)
        assert relative_error(result, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(("group", "zeros"), [(128, True), (None, False)])
def test_widened_weights_are_the_dequantised_matrix_to_the_last_bit(
    group: int | None, zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_fragment_linear, "SCRATCH_BYTES", 128 * 264 * 2)
    monkeypatch.setattr(cuda_fragment_linear, "FUSED_TOKENS", 4)
    weight = random_int4(4, 300, 264, group, zeros)
    result = poisoned(264, 300, torch.float16)
    space = workspace(torch.float16, 264)
    FragmentLinear(pack_fragments(weight.to(DEVICE)), space).forward(
        torch.eye(264, dtype=torch.float16, device=DEVICE), result
    )
    assert torch.equal(result.T.cpu(), dequantize_symmetric(weight, torch.float16))


def test_a_product_of_no_tokens_and_one_of_too_many() -> None:
    linear = fragments(random_int4(0, 8, 128, 128, False))
    nothing = torch.empty(0, 128, dtype=torch.bfloat16, device=DEVICE)
    linear.forward(nothing, nothing[:, :8])
    x = torch.ones(65, 128, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(EngineError, match="65 tokens; its workspace holds 64"):
        linear.forward(x, poisoned(65, 8, torch.bfloat16))


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 512), rows=st.integers(1, 300), k_tiles=st.integers(1, 120))
def test_every_program_of_a_configuration_has_inputs(tokens: int, rows: int, k_tiles: int) -> None:
    config = fragment_config(tokens, rows * 128, k_tiles)
    assert 1 <= config.split <= k_tiles
    assert (rows * 128) % config.block_out == 0
    assert (config.parts_at_a_time == 0) == (config.split == 1)
    # What the matrix unit's layout, and so the weights', is made for.
    assert config.block_out >= 64
    assert config.block_m >= 16
    assert config.num_warps % 4 == 0


@settings(max_examples=40, deadline=None)
@given(
    mib=st.integers(1, 32),
    programs=st.integers(1, 600),
    rows=st.integers(1, 100),
    k_tiles=st.integers(1, 120),
    parts=st.integers(1, 16),
)
def test_what_is_sent_for_lies_inside_the_next_weights(
    mib: int, programs: int, rows: int, k_tiles: int, parts: int
) -> None:
    parts = min(parts, k_tiles)
    layout = pack_fragments(random_int4(0, 1, 128, 128, False))
    words = torch.empty(k_tiles, 128 * rows, 16, dtype=torch.int32, device="meta")
    layout = replace(layout, words=words)
    size = cuda_fragment_linear._sent_bytes(mib << 20, programs, layout, parts)
    assert size % 512 == 0
    assert size * programs <= mib << 20
    last_part = (parts - 1) * k_tiles // parts * 128 * rows * 64
    assert last_part + -(-programs // parts) * size <= words.numel() * 4


_COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from polybatch.kernels.linear.cuda_fragments import fragment_linear_kernel as kernel
names = kernel.arg_names
constants = dict(BLOCK_M=16, BLOCK_OUT=64, AHEAD=2, REDUCED=0, THREADS=128, EVEN_K=True, GROUPED=True,
                 HAS_ZEROS=False, SCALES_BF16=False, SCALED=False, ASSEMBLY=True, DEPENDENT=False,
                 FOLLOWED=False)
types = dict(x_ptr="*bf16", words_ptr="*i32", scales_ptr="*i16", zeros_ptr="*u8", out_ptr="*bf16",
             partials_ptr="*fp32", arrived_ptr="*i32", next_words_ptr="*i32", next_scales_ptr="*i16")
signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
aligned = ("x_ptr", "words_ptr", "scales_ptr", "out_ptr", "rows", "x_stride", "out_stride", "num_in")
source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()},
                   {(names.index(n),): [["tt.divisibility", 16]] for n in aligned})
built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 4})
aliases = dict(re.findall(r"^(#\\w+) = (.*)$", built.asm["ttgir"], re.M))
used = re.findall(r"packed_element = 4 : i32.*-> tensor<64x16xi32, (#\\w+)>", built.asm["ttgir"])
assert used, "the words' loads are gone"
for name in used:
    registers = re.search(r"register = (\\[\\[.*?\\]\\])", aliases[name]).group(1)
    assert registers.startswith("[[8, 0], [0, 4]"), registers
    assert "lane = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]" in aliases[name], aliases[name]
    assert "warp = [[16, 0], [32, 0]]" in aliases[name], aliases[name]
assert built.asm["ptx"].count("wgmma.wait_group") == 1
print("held")
"""


def test_compiled_words_are_read_in_the_order_in_which_they_lie() -> None:
    """The compiler chooses who holds which word; the layout of memory relies on its choice."""
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "held", done.stderr[-2000:]
