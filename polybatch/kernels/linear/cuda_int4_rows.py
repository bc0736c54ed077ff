"""int4 linear for few tokens in which a program sums over all inputs of its rows: no sums between programs.

Splitting the inputs among programs fills the device when tiles are few, but costs a trip through memory for
the sums, an atomic and another trip: about a microsecond of products that take six to nine. Here the inputs
are split among the *warps* of a program (a batched product, a tile of 256 inputs to each of INNER warps),
whose sums meet in shared memory; blocks of rows are small instead.

Each program reads all of x, so this is for up to 16 tokens, whose x is small beside the program's weights,
and for few inputs: at 14,336, `cuda_int4`'s kernel, which splits them, is faster. The layout and the
arithmetic are `cuda_int4`'s.
"""

# Triton compiles these functions from their source; its own types are not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from polybatch.kernels.linear.cuda_int4 import _add_products, _load_pairs


@triton.jit
def _pairs_of(table_ptr, step, row, rows, k_tiles, INNER: tl.constexpr, ASSEMBLY: tl.constexpr):
    """[INNER, R] pairs for the tiles of a step; past the last tile, the table's spare row."""
    tile = tl.minimum(step * INNER + tl.arange(0, INNER), k_tiles)
    return _load_pairs(table_ptr + (tile[:, None] * rows + row[None, :]), ASSEMBLY)


@triton.jit
def _passed_on(values, ASSEMBLY: tl.constexpr):
    """The same values by an instruction: loops that only rename what they carry are not pipelined."""
    if ASSEMBLY:
        values = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [values], dtype=tl.int32, is_pure=True, pack=1
        )
    return values


@triton.jit
def _tokens_at(pointers, is_token, inputs_left, column, dtype: tl.constexpr, EVEN_K: tl.constexpr):
    """[INNER, BLOCK_M, 64] activations -> [INNER, 64, BLOCK_M]; zeros beyond tokens and inputs."""
    mask = is_token[None, :, None]
    if not EVEN_K:
        mask = mask & (column[None, None, :] < inputs_left[:, None, None])
    return tl.trans(tl.load(pointers, mask=mask, other=0.0).to(dtype), 0, 2, 1)


@triton.jit(do_not_specialize=["num_tokens", "k_tiles"])
def int4_rows_kernel(
    x_ptr,  # [num_tokens, num_in], rows x_stride apart
    words_ptr,  # [k_tiles, rows, 64] int16
    scales_ptr,  # GROUPED: [k_tiles + 1, rows] int32, two 16-bit scales each; else [rows] float
    offsets_ptr,  # HAS_ZEROS: [k_tiles + 1, rows] int32, 8 - zero of two groups; else unused
    out_ptr,  # [num_tokens, num_out], rows out_stride apart
    num_tokens,
    num_in,
    num_out,
    rows,
    k_tiles,
    x_stride,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    INNER: tl.constexpr,  # tiles of 256 inputs side by side, one to a warp
    STEPS: tl.constexpr,  # cdiv(k_tiles, INNER)
    EVEN_K: tl.constexpr,  # num_in is a multiple of 256 INNER
    GROUPED: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SCALES_BF16: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """One tile [BLOCK_OUT, BLOCK_M] of y^T over all inputs."""
    # The interpreter does not multiply 16-bit floats rightly.
    dtype: tl.constexpr = x_ptr.dtype.element_ty if ASSEMBLY else tl.float32
    row = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = token < num_tokens
    inner = tl.arange(0, INNER)
    column = tl.arange(0, 64)
    word_ptrs = words_ptr + (row[None, :, None] * 64 + column[None, None, :])
    x_ptrs = x_ptr + token[None, :, None] * x_stride + inner[:, None, None] * 256 + column[None, None, :]
    acc = tl.zeros([INNER, BLOCK_OUT, BLOCK_M], tl.float32)
    # Scales go to registers three steps ahead, like the weights beside them to shared memory.
    scales = tl.zeros([INNER, BLOCK_OUT], tl.int32)
    scales_1 = scales
    scales_2 = scales
    offsets = scales
    offsets_1 = scales
    offsets_2 = scales
    if GROUPED:
        scales = _pairs_of(scales_ptr, 0, row, rows, k_tiles, INNER, ASSEMBLY)
        scales_1 = _pairs_of(scales_ptr, 1, row, rows, k_tiles, INNER, ASSEMBLY)
        scales_2 = _pairs_of(scales_ptr, 2, row, rows, k_tiles, INNER, ASSEMBLY)
    if HAS_ZEROS:
        offsets = _pairs_of(offsets_ptr, 0, row, rows, k_tiles, INNER, ASSEMBLY)
        offsets_1 = _pairs_of(offsets_ptr, 1, row, rows, k_tiles, INNER, ASSEMBLY)
        offsets_2 = _pairs_of(offsets_ptr, 2, row, rows, k_tiles, INNER, ASSEMBLY)
    for step in range(STEPS):
        tile = step * INNER + inner
        left = num_in - tile * 256
        if not EVEN_K:
            # Tiles past the end meet an x of zeros.
            tile = tl.minimum(tile, k_tiles - 1)
        words = tl.load(word_ptrs + tile[:, None, None] * (rows * 64))
        at = x_ptrs + step * (INNER * 256)
        x0 = _tokens_at(at, is_token, left, column, dtype, EVEN_K)
        x1 = _tokens_at(at + 64, is_token, left - 64, column, dtype, EVEN_K)
        x2 = _tokens_at(at + 128, is_token, left - 128, column, dtype, EVEN_K)
        x3 = _tokens_at(at + 192, is_token, left - 192, column, dtype, EVEN_K)
        acc = _add_products(
            acc, words, x0, x1, x2, x3, scales, offsets, dtype, GROUPED, HAS_ZEROS, SCALES_BF16, ASSEMBLY
        )
        if GROUPED:
            scales = _passed_on(scales_1, ASSEMBLY)
            scales_1 = _passed_on(scales_2, ASSEMBLY)
            scales_2 = _pairs_of(scales_ptr, step + 3, row, rows, k_tiles, INNER, ASSEMBLY)
        if HAS_ZEROS:
            offsets = _passed_on(offsets_1, ASSEMBLY)
            offsets_1 = _passed_on(offsets_2, ASSEMBLY)
            offsets_2 = _pairs_of(offsets_ptr, step + 3, row, rows, k_tiles, INNER, ASSEMBLY)
        if step == STEPS - 1:
            # Behind the loop, it makes Triton keep more in registers and fetch later.
            total = tl.sum(acc, 0)
            if not GROUPED:
                total *= tl.load(scales_ptr + row).to(tl.float32)[:, None]
            tl.store(
                out_ptr + token[:, None] * out_stride + row[None, :],
                tl.trans(total).to(out_ptr.dtype.element_ty),
                mask=is_token[:, None] & (row < num_out)[None, :],
            )
