"""int4 linear in Triton: y = x dequantised(W)^T, 4-bit weights, 16-bit activations, float32 sums.

The weight rows take the place of the matrix unit's left operand (y^T = W x^T), so a batch of 1 to 128
tokens is its narrow side and weights go from shared memory into the operand's registers with no exchange
between threads. What makes that possible is the layout, made once at load time (`cuda_pack`): a 16-bit
word holds four weights of one row that are 64 inputs apart, so plane j of a tile of words *is* the operand
for inputs 64 j .. 64 j + 63 of the tile. A pair of words unpacks into a pair of floats with a shift, an
OR of an exponent onto the nibble (mantissa n under exponent 2^7 is 128 + n) and a subtraction.

Scales of groups of 128 inputs multiply float32 sums. Tiles of 128 tokens by 256 rows have no registers for
a second set of sums: there scales multiply weights (SCALED), which rounds a weight to 16 bits as widening it
would, and a step covers COLUMNS = 32 of a tile's 64 columns to keep three stages in shared memory.

Few tokens leave too few tiles for all multiprocessors, so inputs are split among `split` programs. Each
writes its sums; the last to arrive adds all in the order of the inputs, so that the result does not depend
on who that was. Not here: thousands of tokens, for which `Int4Linear` widens the weights into scratch and
calls cuBLAS.

Sources: MARLIN (Frantar et al. 2024) for the offline layout and the unpacking; the exponent trick as in
Kim et al. 2022 ("Who says elephants can't run").
"""

# Triton compiles these functions from their source; its own types are not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

# $4 holds two words; plane j lies in bits 4 j to 4 j + 3 of each. 0xEA is (a & b) | c.
_EXTRACT = """{{
    .reg .b32 a, b, c, z;
    shr.u32 a, $4, 4;
    shr.u32 b, $4, 8;
    shr.u32 c, $4, 12;
    lop3.b32 $0, $4, 0x000F000F, {magic}, 0xEA;
    lop3.b32 $1, a, 0x000F000F, {magic}, 0xEA;
    lop3.b32 $2, b, 0x000F000F, {magic}, 0xEA;
    lop3.b32 $3, c, 0x000F000F, {magic}, 0xEA;
"""
_SUBTRACT = """
    mov.b32 z, {zero};
    sub.{type} $0, $0, z;
    sub.{type} $1, $1, z;
    sub.{type} $2, $2, z;
    sub.{type} $3, $3, z;
"""
# $5 and $6 are the scales of planes 0 and 1 and of planes 2 and 3, $7 and $8 what to take off.
_SUBTRACT_ZEROS = """
    sub.{type} $0, $0, $7;
    sub.{type} $1, $1, $7;
    sub.{type} $2, $2, $8;
    sub.{type} $3, $3, $8;
"""
_SCALE = """
    mul.{type} $0, $0, $5;
    mul.{type} $1, $1, $5;
    mul.{type} $2, $2, $6;
    mul.{type} $3, $3, $6;
"""
# 128 and 136 in bfloat16, 1024 and 1032 in float16, twice.
_BF16 = {"type": "bf16x2", "magic": "0x43004300", "zero": "0x43084308"}
_FP16 = {"type": "f16x2", "magic": "0x64006400", "zero": "0x64086408"}
_UNPACK = _EXTRACT + _SUBTRACT + "}}"
_UNPACK_SCALED = _EXTRACT + _SUBTRACT + _SCALE + "}}"
_UNPACK_ZEROS = _EXTRACT + _SUBTRACT_ZEROS + _SCALE + "}}"
UNPACK_BF16 = tl.constexpr(_UNPACK.format(**_BF16))
UNPACK_FP16 = tl.constexpr(_UNPACK.format(**_FP16))
UNPACK_SCALED_BF16 = tl.constexpr(_UNPACK_SCALED.format(**_BF16))
UNPACK_SCALED_FP16 = tl.constexpr(_UNPACK_SCALED.format(**_FP16))
UNPACK_ZEROS_BF16 = tl.constexpr(_UNPACK_ZEROS.format(**_BF16))
UNPACK_ZEROS_FP16 = tl.constexpr(_UNPACK_ZEROS.format(**_FP16))


@triton.jit
def _planes(words, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """[R, 64] int16 words -> four planes [R, 64] of weights, -8 to 7, in `dtype`."""
    if ASSEMBLY:
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            UNPACK_BF16 if dtype == tl.bfloat16 else UNPACK_FP16,
            "=&r,=&r,=&r,=&r,r",
            [words],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=2,
        )
        p0 = p0.to(dtype, bitcast=True)
        p1 = p1.to(dtype, bitcast=True)
        p2 = p2.to(dtype, bitcast=True)
        p3 = p3.to(dtype, bitcast=True)
    else:
        p0 = ((words & 15) - 8).to(dtype)
        p1 = (((words >> 4) & 15) - 8).to(dtype)
        p2 = (((words >> 8) & 15) - 8).to(dtype)
        p3 = (((words >> 12) & 15) - 8).to(dtype)
    return p0, p1, p2, p3


@triton.jit
def _pairs_of_bits(values, dtype: tl.constexpr):
    """[R] float32 -> [R, 1] int16, the bits of each in `dtype`."""
    return values.to(dtype).to(tl.int16, bitcast=True)[:, None]


@triton.jit
def _scaled_planes(
    words,
    scales,
    offsets,
    dtype: tl.constexpr,
    BF16: tl.constexpr,
    ZEROS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """[R, C] words, [R] pairs of scales and, with ZEROS, of 8 - zero -> four planes [R, C] of weights."""
    low, high = _scales_of(scales, BF16)
    if ASSEMBLY:
        base: tl.constexpr = 136.0 if dtype == tl.bfloat16 else 1032.0
        low = _pairs_of_bits(low, dtype)
        high = _pairs_of_bits(high, dtype)
        if ZEROS:
            low_offset, high_offset = _offsets_of(offsets)
            p0, p1, p2, p3 = tl.inline_asm_elementwise(
                UNPACK_ZEROS_BF16 if dtype == tl.bfloat16 else UNPACK_ZEROS_FP16,
                "=&r,=&r,=&r,=&r,r,r,r,r,r",
                [
                    words,
                    low,
                    high,
                    _pairs_of_bits(base - low_offset, dtype),
                    _pairs_of_bits(base - high_offset, dtype),
                ],
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
                is_pure=True,
                pack=2,
            )
        else:
            p0, p1, p2, p3 = tl.inline_asm_elementwise(
                UNPACK_SCALED_BF16 if dtype == tl.bfloat16 else UNPACK_SCALED_FP16,
                "=&r,=&r,=&r,=&r,r,r,r",
                [words, low, high],
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
                is_pure=True,
                pack=2,
            )
        p0 = p0.to(dtype, bitcast=True)
        p1 = p1.to(dtype, bitcast=True)
        p2 = p2.to(dtype, bitcast=True)
        p3 = p3.to(dtype, bitcast=True)
    else:
        p0, p1, p2, p3 = _planes(words, dtype, ASSEMBLY)
        if ZEROS:
            low_offset, high_offset = _offsets_of(offsets)
            p0 += low_offset[:, None]
            p1 += low_offset[:, None]
            p2 += high_offset[:, None]
            p3 += high_offset[:, None]
        p0 *= low[:, None]
        p1 *= low[:, None]
        p2 *= high[:, None]
        p3 *= high[:, None]
    return p0, p1, p2, p3


@triton.jit
def _load_pairs(pointers, ASSEMBLY: tl.constexpr):
    """int32 per row, read-only. As an elementwise operation it is done in whatever layout the sums have."""
    if ASSEMBLY:
        pairs = tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [pointers], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        pairs = tl.load(pointers)
    return pairs


@triton.jit
def _scales_of(pairs, BF16: tl.constexpr):
    """Two 16-bit scales in 32 bits, the lower half first -> two float32."""
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    low = (pairs & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _offsets_of(pairs):
    """Two 16-bit integers in 32 bits, the lower half first -> two float32."""
    return (pairs & 0xFFFF).to(tl.int16).to(tl.float32), (pairs >> 16).to(tl.float32)


@triton.jit
def _load_x(pointers, is_token, inputs_left, column, dtype: tl.constexpr, EVEN_K: tl.constexpr):
    mask = is_token[:, None]
    if not EVEN_K:
        mask = mask & (column < inputs_left)[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(dtype)


@triton.jit(do_not_specialize=["num_tokens", "k_tiles", "split"])
def int4_linear_kernel(
    x_ptr,  # [num_tokens, num_in], rows x_stride apart
    words_ptr,  # [k_tiles, rows, 64] int16
    scales_ptr,  # GROUPED: [k_tiles + 1, rows] int32, two 16-bit scales each; else [rows] float
    offsets_ptr,  # HAS_ZEROS: [k_tiles + 1, rows] int32, 8 - zero of two groups; else unused
    out_ptr,  # [num_tokens, num_out], rows out_stride apart
    partials_ptr,  # [m tiles, out tiles, split, BLOCK_OUT, BLOCK_M] float32
    arrived_ptr,  # [m tiles * out tiles] int32, zero before and after
    num_tokens,
    num_in,
    num_out,
    rows,
    k_tiles,
    split,
    x_stride,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    COLUMNS: tl.constexpr,  # of a tile's 64, in a step; 64 unless SCALED
    REDUCED: tl.constexpr,  # parts of the inputs to add at a time; 0: not split
    EVEN_K: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SCALES_BF16: tl.constexpr,
    SCALED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """One tile [BLOCK_OUT, BLOCK_M] of y^T over one of `split` stretches of the inputs."""
    # The interpreter does not multiply 16-bit floats rightly.
    dtype: tl.constexpr = x_ptr.dtype.element_ty if ASSEMBLY else tl.float32
    m_tile = tl.program_id(0)
    out_tile = tl.program_id(1)
    part = tl.program_id(2)
    row = out_tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    token = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, COLUMNS)
    is_token = token < num_tokens
    STEPS: tl.constexpr = 64 // COLUMNS
    first = part * (k_tiles * STEPS) // split
    last = (part + 1) * (k_tiles * STEPS) // split
    acc = tl.zeros([BLOCK_OUT, BLOCK_M], tl.float32)
    ones = tl.full([BLOCK_OUT, 64], 1.0, tl.float32).to(dtype)
    scales = tl.zeros([BLOCK_OUT], tl.int32)
    offsets = tl.zeros([BLOCK_OUT], tl.int32)
    # Fetched a tile ahead; both tables end with a spare row for that.
    if GROUPED and not SCALED:
        scales = _load_pairs(scales_ptr + first * rows + row, ASSEMBLY)
        if HAS_ZEROS:
            offsets = _load_pairs(offsets_ptr + first * rows + row, ASSEMBLY)
    word_ptrs = words_ptr + row[:, None] * 64 + column[None, :]
    x_ptrs = x_ptr + token[:, None] * x_stride + column[None, :]
    for step in range(first, last):
        tile = step // STEPS
        shift = step % STEPS * COLUMNS
        words = tl.load(word_ptrs + (tile * (rows * 64) + shift))
        at = x_ptrs + (tile * 256 + shift)
        left = num_in - tile * 256 - shift
        x0 = tl.trans(_load_x(at, is_token, left, column, dtype, EVEN_K))
        x1 = tl.trans(_load_x(at + 64, is_token, left - 64, column, dtype, EVEN_K))
        x2 = tl.trans(_load_x(at + 128, is_token, left - 128, column, dtype, EVEN_K))
        x3 = tl.trans(_load_x(at + 192, is_token, left - 192, column, dtype, EVEN_K))
        if SCALED:
            # Through the pipeline and shared memory, from where any layout can be had.
            scale_pairs = tl.load(scales_ptr + tile * rows + row)
            offset_pairs = scale_pairs
            if HAS_ZEROS:
                offset_pairs = tl.load(offsets_ptr + tile * rows + row)
            w0, w1, w2, w3 = _scaled_planes(
                words, scale_pairs, offset_pairs, dtype, SCALES_BF16, HAS_ZEROS, ASSEMBLY
            )
        else:
            w0, w1, w2, w3 = _planes(words, dtype, ASSEMBLY)
        if GROUPED and not SCALED:
            scale_low, scale_high = _scales_of(scales, SCALES_BF16)
            scales = _load_pairs(scales_ptr + (tile + 1) * rows + row, ASSEMBLY)
            low = tl.zeros([BLOCK_OUT, BLOCK_M], tl.float32)
            high = tl.zeros([BLOCK_OUT, BLOCK_M], tl.float32)
            if HAS_ZEROS:
                # (q - zero) x = (q - 8) x + (8 - zero) sum(x); the matrix unit also sums x.
                offset_low, offset_high = _offsets_of(offsets)
                offsets = _load_pairs(offsets_ptr + (tile + 1) * rows + row, ASSEMBLY)
                low = tl.dot(ones, x1, tl.dot(ones, x0, low)) * offset_low[:, None]
                high = tl.dot(ones, x3, tl.dot(ones, x2, high)) * offset_high[:, None]
            acc += tl.dot(w1, x1, tl.dot(w0, x0, low)) * scale_low[:, None]
            acc += tl.dot(w3, x3, tl.dot(w2, x2, high)) * scale_high[:, None]
        else:
            acc = tl.dot(w0, x0, acc)
            acc = tl.dot(w1, x1, acc)
            acc = tl.dot(w2, x2, acc)
            acc = tl.dot(w3, x3, acc)
    if not GROUPED:
        acc *= tl.load(scales_ptr + row).to(tl.float32)[:, None]

    mask = is_token[:, None] & (row < num_out)[None, :]
    out_ptrs = out_ptr + token[:, None] * out_stride + row[None, :]
    if REDUCED == 0:
        tl.store(out_ptrs, tl.trans(acc).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tile_id = m_tile * tl.num_programs(1) + out_tile
        cell = tl.arange(0, BLOCK_OUT)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        partial_ptrs = partials_ptr + tile_id * (split * BLOCK_OUT * BLOCK_M) + cell
        tl.store(partial_ptrs + part * (BLOCK_OUT * BLOCK_M), acc)
        # All threads' stores come before the count that publishes them.
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + tile_id, 1, sem="acq_rel") == split - 1:
            total = tl.zeros([BLOCK_OUT, BLOCK_M], tl.float32)
            # Loads of several parts are under way together; the sum keeps the order of the inputs.
            for base in range(0, split, REDUCED):
                for i in tl.static_range(REDUCED):
                    other = base + i
                    total += tl.load(
                        partial_ptrs + other * (BLOCK_OUT * BLOCK_M),
                        mask=cell * 0 + other < split,
                        other=0.0,
                        cache_modifier=".cg",
                    )
            tl.store(out_ptrs, tl.trans(total).to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(arrived_ptr + tile_id, 0)


@triton.jit
def dequantize_kernel(
    words_ptr,
    scales_ptr,
    offsets_ptr,
    out_ptr,  # [num_rows, num_in] of the weights from first_row on, contiguous
    first_row,
    num_rows,
    num_in,
    rows,
    BLOCK_OUT: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SCALES_BF16: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Widen the words of one input tile and BLOCK_OUT rows; the tables are those of int4_linear_kernel."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty if ASSEMBLY else tl.float32
    tile = tl.program_id(0)
    local = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = first_row + local
    column = tl.arange(0, 64)
    words = tl.load(words_ptr + tile * (rows * 64) + row[:, None] * 64 + column[None, :])
    w0, w1, w2, w3 = _planes(words, dtype, ASSEMBLY)
    if GROUPED:
        low, high = _scales_of(tl.load(scales_ptr + tile * rows + row), SCALES_BF16)
    else:
        low = tl.load(scales_ptr + row).to(tl.float32)
        high = low
    low_offset = tl.zeros([BLOCK_OUT], tl.float32)
    high_offset = low_offset
    if HAS_ZEROS:
        low_offset, high_offset = _offsets_of(tl.load(offsets_ptr + tile * rows + row))
    out_ptrs = out_ptr + local[:, None] * num_in + tile * 256 + column[None, :]
    left = num_in - tile * 256
    is_row = (local < num_rows)[:, None]
    w0 = (w0.to(tl.float32) + low_offset[:, None]) * low[:, None]
    w1 = (w1.to(tl.float32) + low_offset[:, None]) * low[:, None]
    w2 = (w2.to(tl.float32) + high_offset[:, None]) * high[:, None]
    w3 = (w3.to(tl.float32) + high_offset[:, None]) * high[:, None]
    tl.store(out_ptrs, w0.to(out_ptr.dtype.element_ty), mask=is_row & (column < left)[None, :])
    tl.store(out_ptrs + 64, w1.to(out_ptr.dtype.element_ty), mask=is_row & (column < left - 64)[None, :])
    tl.store(out_ptrs + 128, w2.to(out_ptr.dtype.element_ty), mask=is_row & (column < left - 128)[None, :])
    tl.store(out_ptrs + 192, w3.to(out_ptr.dtype.element_ty), mask=is_row & (column < left - 192)[None, :])
