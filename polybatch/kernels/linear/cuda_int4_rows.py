"""int4 linear for few tokens in which a program sums over all inputs of its rows: no sums between programs.

Splitting the inputs among programs fills the device when tiles are few, but costs a trip through memory for
the sums, an atomic and another trip: about a microsecond of products that take six to fifteen. Here the
inputs are split among the *warps* of a program (a batched product, a tile of 256 inputs to each of INNER
warps), whose sums meet in shared memory. A grid is at most what is resident at once; with more slices of rows
than that, a program takes several in one flat loop, so that loads for the next are under way while one ends.

Each program reads all of x, so this is for tokens whose x is small beside BLOCK_ROWS rows of weights: up to
16. The layout and the arithmetic are `cuda_int4`'s.
"""

# Triton compiles these functions from their source; its own types are not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from polybatch.kernels.linear.cuda_int4 import _add_products, _load_pairs, _unit


@triton.jit
def _pointers_of_pairs(
    step,
    slice_stride,
    rows,
    k_tiles,
    BLOCK_ROWS: tl.constexpr,
    INNER: tl.constexpr,
    HALVES: tl.constexpr,
    STEPS: tl.constexpr,
    SLICES: tl.constexpr,
):
    """[INNER, BLOCK_ROWS] places in a table for a step of the loop; past the last tile, its spare row."""
    step = tl.minimum(step, SLICES * STEPS - 1)
    tile = (step % STEPS) // HALVES * INNER + tl.arange(0, INNER)
    row = (tl.program_id(0) + step // STEPS * slice_stride) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return tl.minimum(tile, k_tiles)[:, None] * rows + row[None, :]


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
    """[INNER, BLOCK_M, COLUMNS] activations -> [INNER, COLUMNS, BLOCK_M]; zeros beyond tokens and inputs."""
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
    BLOCK_ROWS: tl.constexpr,
    INNER: tl.constexpr,  # tiles of 256 inputs side by side, one to a warp
    COLUMNS: tl.constexpr,  # of a tile's 64, in a step
    STEPS: tl.constexpr,  # cdiv(k_tiles, INNER) * 64 / COLUMNS
    SLICES: tl.constexpr,  # of BLOCK_ROWS rows, one grid apart, in a program
    EVEN_K: tl.constexpr,  # num_in is a multiple of 256 INNER
    GROUPED: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SCALES_BF16: tl.constexpr,
    SHORT: tl.constexpr,  # two shifts fewer in unpacking
    ASSEMBLY: tl.constexpr,
):
    """SLICES tiles [BLOCK_ROWS, BLOCK_M] of y^T over all inputs."""
    # The interpreter does not multiply 16-bit floats rightly.
    dtype: tl.constexpr = x_ptr.dtype.element_ty if ASSEMBLY else tl.float32
    HALVES: tl.constexpr = 64 // COLUMNS
    apart = tl.num_programs(0)
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = token < num_tokens
    column = tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    x_ptrs = x_ptr + token[None, :, None] * x_stride + inner[:, None, None] * 256 + column[None, None, :]
    acc = tl.zeros([INNER, BLOCK_ROWS, BLOCK_M], tl.float32)
    UNIT: tl.constexpr = _unit(x_ptr.dtype.element_ty, SHORT)
    ones = tl.full([INNER, BLOCK_ROWS, COLUMNS], 1 / UNIT, tl.float32).to(dtype)
    # Scales go to registers three steps ahead, like the weights beside them to shared memory.
    scales = tl.zeros([INNER, BLOCK_ROWS], tl.int32)
    scales_1 = scales
    scales_2 = scales
    offsets = scales
    offsets_1 = scales
    offsets_2 = scales
    at_0 = _pointers_of_pairs(0, apart, rows, k_tiles, BLOCK_ROWS, INNER, HALVES, STEPS, SLICES)
    at_1 = _pointers_of_pairs(1, apart, rows, k_tiles, BLOCK_ROWS, INNER, HALVES, STEPS, SLICES)
    at_2 = _pointers_of_pairs(2, apart, rows, k_tiles, BLOCK_ROWS, INNER, HALVES, STEPS, SLICES)
    if GROUPED:
        scales = _load_pairs(scales_ptr + at_0, ASSEMBLY)
        scales_1 = _load_pairs(scales_ptr + at_1, ASSEMBLY)
        scales_2 = _load_pairs(scales_ptr + at_2, ASSEMBLY)
    if HAS_ZEROS:
        offsets = _load_pairs(offsets_ptr + at_0, ASSEMBLY)
        offsets_1 = _load_pairs(offsets_ptr + at_1, ASSEMBLY)
        offsets_2 = _load_pairs(offsets_ptr + at_2, ASSEMBLY)
    for step in range(SLICES * STEPS):
        first_tile = (step % STEPS) // HALVES * INNER
        shift = step % HALVES * COLUMNS
        row = (tl.program_id(0) + step // STEPS * apart) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        tile = first_tile + inner
        if not EVEN_K:
            # Tiles past the end meet an x of zeros.
            tile = tl.minimum(tile, k_tiles - 1)
        places = row[None, :, None] * 64 + (shift + column)[None, None, :]
        words = tl.load(words_ptr + tile[:, None, None] * (rows * 64) + places)
        at = x_ptrs + (first_tile * 256 + shift)
        left = num_in - (first_tile + inner) * 256 - shift
        x0 = _tokens_at(at, is_token, left, column, dtype, EVEN_K)
        x1 = _tokens_at(at + 64, is_token, left - 64, column, dtype, EVEN_K)
        x2 = _tokens_at(at + 128, is_token, left - 128, column, dtype, EVEN_K)
        x3 = _tokens_at(at + 192, is_token, left - 192, column, dtype, EVEN_K)
        acc = _add_products(
            acc, words, x0, x1, x2, x3, scales, offsets, ones, x_ptr.dtype.element_ty,
            GROUPED, HAS_ZEROS, SCALES_BF16, SHORT, ASSEMBLY,
        )  # fmt: skip
        at_3 = _pointers_of_pairs(step + 3, apart, rows, k_tiles, BLOCK_ROWS, INNER, HALVES, STEPS, SLICES)
        if GROUPED:
            scales = _passed_on(scales_1, ASSEMBLY)
            scales_1 = _passed_on(scales_2, ASSEMBLY)
            scales_2 = _load_pairs(scales_ptr + at_3, ASSEMBLY)
        if HAS_ZEROS:
            offsets = _passed_on(offsets_1, ASSEMBLY)
            offsets_1 = _passed_on(offsets_2, ASSEMBLY)
            offsets_2 = _load_pairs(offsets_ptr + at_3, ASSEMBLY)
        if step % STEPS == STEPS - 1:
            total = tl.sum(acc, 0)
            if not GROUPED:
                total *= (tl.load(scales_ptr + row).to(tl.float32) * UNIT)[:, None]
            tl.store(
                out_ptr + token[:, None] * out_stride + row[None, :],
                tl.trans(total).to(out_ptr.dtype.element_ty),
                mask=is_token[:, None] & (row < num_out)[None, :],
            )
            acc = tl.zeros([INNER, BLOCK_ROWS, BLOCK_M], tl.float32)
