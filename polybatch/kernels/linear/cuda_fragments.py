"""int4 linear in Triton with weights read straight into the matrix unit's registers: y^T = W x^T.

`cuda_pack.pack_fragments` lays 16 rows by 128 inputs out as the left operand wants them: thread l of a warp
finds its 16 bytes of every 8 columns of words at place l. So a warp reads 512 contiguous bytes, nothing
passes through shared memory and no thread waits for another's weights. AHEAD tiles of 128 inputs are on
their way while one is multiplied. The four planes of a tile are joined into one operand of 128 inputs, which
costs nothing because joining only renames registers: one product and one wait per tile instead of four.
The layout is the compiler's for tiles of at least 64 rows and 16 tokens and whole groups of four warps.

Scales multiply float32 sums, one group of 128 inputs at a time; SCALED multiplies them into weights, for
tiles that have no registers for a second set of sums. Zeros of asymmetric weights are taken off where 8
would be: integers up to 16 stay exact.

A launch may send for weights of the product after it (following) while its own last ones arrive, so that
memory stays busy over its end and the start of the next launch.

Sources: MARLIN (Frantar et al. 2024) for the offline layout and the unpacking; the exponent trick as in
Kim et al. 2022 ("Who says elephants can't run").
"""

# Triton compiles these functions from their source; its own types are not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, misc"
# ruff: noqa: RUF005 - it compiles no starred tuples.

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# 16 bytes per thread where $8 says so. The bits are the policy "evict first": read once, not to be kept.
_LOAD = tl.constexpr("""{
    .reg .pred p;
    .reg .b64 policy;
    mov.b64 policy, 0x12f0000000000000;
    setp.ne.u32 p, $8, 0;
    mov.b32 $0, 0;
    mov.b32 $1, 0;
    mov.b32 $2, 0;
    mov.b32 $3, 0;
    @p ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 {$0, $1, $2, $3}, [$4], policy;
}""")
_LOAD_16 = tl.constexpr("""{
    .reg .b16 h;
    ld.global.nc.b16 h, [$1];
    cvt.u32.u16 $0, h;
}""")
_LOAD_8 = tl.constexpr("ld.global.nc.u8 $0, [$1];")
_PREFETCH = tl.constexpr("""{
    .reg .pred p;
    setp.ne.u32 p, $2, 0;
    @p cp.async.bulk.prefetch.L2.global [$1], $2;
    mov.b32 $0, 0;
}""")
# $4 holds two words, $5 the zero twice over the exponent; plane j lies in bits 4 j to 4 j + 3 of each word.
_UNPACK = """{{
    .reg .b32 a, b, c;
    shr.u32 a, $4, 4;
    shr.u32 b, $4, 8;
    shr.u32 c, $4, 12;
    lop3.b32 $0, $4, 0x000F000F, {magic}, 0xEA;
    lop3.b32 $1, a, 0x000F000F, {magic}, 0xEA;
    lop3.b32 $2, b, 0x000F000F, {magic}, 0xEA;
    lop3.b32 $3, c, 0x000F000F, {magic}, 0xEA;
    sub.{type} $0, $0, $5;
    sub.{type} $1, $1, $5;
    sub.{type} $2, $2, $5;
    sub.{type} $3, $3, $5;
"""
_SCALE = """
    mul.{type} $0, $0, $6;
    mul.{type} $1, $1, $6;
    mul.{type} $2, $2, $6;
    mul.{type} $3, $3, $6;
"""
# 128 in bfloat16 and 1024 in float16, twice: mantissa n under them is that plus n.
_BF16 = {"type": "bf16x2", "magic": "0x43004300"}
_FP16 = {"type": "f16x2", "magic": "0x64006400"}
_UNPACK_BF16 = tl.constexpr((_UNPACK + "}}").format(**_BF16))
_UNPACK_FP16 = tl.constexpr((_UNPACK + "}}").format(**_FP16))
_UNPACK_SCALED_BF16 = tl.constexpr((_UNPACK + _SCALE + "}}").format(**_BF16))
_UNPACK_SCALED_FP16 = tl.constexpr((_UNPACK + _SCALE + "}}").format(**_FP16))


@triton.jit
def _load_words(pointers, valid, ASSEMBLY: tl.constexpr):
    """[R, 16] int32, zeros where not valid. In assembly the load takes the layout of what it is used for."""
    if ASSEMBLY:
        words = tl.inline_asm_elementwise(
            _LOAD, "=&r,=&r,=&r,=&r,l,l,l,l,r,r,r,r", [pointers, valid], dtype=tl.int32, is_pure=True, pack=4
        )
    else:
        words = tl.load(pointers, mask=valid != 0, other=0)
    return words


@triton.jit
def _load_small(pointers, ASSEMBLY: tl.constexpr):
    """[R] int32 from unsigned 16 or 8 bits each."""
    if ASSEMBLY:
        if pointers.dtype.element_ty == tl.int16:
            values = tl.inline_asm_elementwise(
                _LOAD_16, "=r,l", [pointers], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            values = tl.inline_asm_elementwise(
                _LOAD_8, "=r,l", [pointers], dtype=tl.int32, is_pure=True, pack=1
            )
    else:
        values = tl.load(pointers).to(tl.int32)
    return values


@triton.jit
def _keep(values, ASSEMBLY: tl.constexpr):
    """The values by way of an operation: no loop that only renames what it carries is pipelined."""
    if ASSEMBLY:
        values = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [values], dtype=tl.int32, is_pure=True, pack=1
        )
    return values


@triton.jit
def _prefetch(pointers, num_bytes):
    tl.inline_asm_elementwise(
        _PREFETCH, "=r,l,r", [pointers, num_bytes], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _scale_of(bits, BF16: tl.constexpr):
    """The 16 bits of a scale -> float32."""
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    return bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _halves(pairs, dtype: tl.constexpr):
    """[R, 16] int32 -> [R, 16, 2], the two floats in each."""
    low = pairs.to(tl.int16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _operand(
    words, zeros, scales, dtype: tl.constexpr, SCALED: tl.constexpr, ASSEMBLY: tl.constexpr, R: tl.constexpr
):
    """[R, 16] int32 words, [R] zeros, [R] float32 scales -> [R, 128] weights; scales count if SCALED."""
    if ASSEMBLY:
        magic: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
        base = (zeros + magic) * 0x10001
        if SCALED:
            rounded = scales.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            p0, p1, p2, p3 = tl.inline_asm_elementwise(
                _UNPACK_SCALED_BF16 if dtype == tl.bfloat16 else _UNPACK_SCALED_FP16,
                "=&r,=&r,=&r,=&r,r,r,r",
                [words, base[:, None], (rounded * 0x10001)[:, None]],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        else:
            p0, p1, p2, p3 = tl.inline_asm_elementwise(
                _UNPACK_BF16 if dtype == tl.bfloat16 else _UNPACK_FP16,
                "=&r,=&r,=&r,=&r,r,r",
                [words, base[:, None]],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        h0 = _halves(p0, dtype)
        h1 = _halves(p1, dtype)
        h2 = _halves(p2, dtype)
        h3 = _halves(p3, dtype)
    else:
        factor = tl.full([R], 1.0, tl.float32)
        if SCALED:
            factor = scales
        low = words & 0xFFFF
        high = (words >> 16) & 0xFFFF
        both = tl.join(low, high)
        off = zeros[:, None, None]
        by = factor[:, None, None]
        h0 = (((both & 15) - off).to(tl.float32) * by).to(dtype)
        h1 = ((((both >> 4) & 15) - off).to(tl.float32) * by).to(dtype)
        h2 = ((((both >> 8) & 15) - off).to(tl.float32) * by).to(dtype)
        h3 = ((((both >> 12) & 15) - off).to(tl.float32) * by).to(dtype)
    planes = tl.join(tl.join(h0, h2), tl.join(h1, h3))
    # [row, word pair, half, high bit of the plane, low bit] -> [row, plane, column].
    return tl.reshape(tl.permute(planes, (0, 3, 4, 1, 2)), [R, 128])


@triton.jit(do_not_specialize=["num_tokens", "k_tiles", "split", "next_parts", "next_tiles", "next_bytes"])
def fragment_linear_kernel(
    x_ptr,  # [num_tokens, num_in], rows x_stride apart
    words_ptr,  # [k_tiles, rows, 16] int32, in fragment order
    scales_ptr,  # GROUPED: [k_tiles, rows] int16, the bits of 16-bit floats; else [rows] float32
    zeros_ptr,  # HAS_ZEROS: [k_tiles, rows] uint8; else unused
    out_ptr,  # [num_tokens, num_out], rows out_stride apart
    partials_ptr,  # [m tiles, out tiles, split, BLOCK_OUT, BLOCK_M] float32
    arrived_ptr,  # [m tiles * out tiles] int32, zero before and after
    next_words_ptr,  # FOLLOWED: words and scales of the product after this one
    next_scales_ptr,
    num_tokens,
    num_in,
    num_out,
    rows,
    k_tiles,
    split,
    next_rows,
    next_tiles,
    next_parts,  # in which the product after this one reads its inputs at once
    next_bytes,  # of its words that each program sends for, a multiple of 512
    x_stride,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    AHEAD: tl.constexpr,
    REDUCED: tl.constexpr,  # parts of the inputs to add at a time; 0: not split
    THREADS: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SCALES_BF16: tl.constexpr,
    SCALED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
    FOLLOWED: tl.constexpr,
):
    """One tile [BLOCK_OUT, BLOCK_M] of y^T over one of `split` stretches of the inputs."""
    # The interpreter does not multiply 16-bit floats rightly.
    dtype: tl.constexpr = x_ptr.dtype.element_ty if ASSEMBLY else tl.float32
    m_tile = tl.program_id(0)
    out_tile = tl.program_id(1)
    part = tl.program_id(2)
    row = out_tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    token = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = token < num_tokens
    first = part * k_tiles // split
    last = (part + 1) * k_tiles // split
    if DEPENDENT:
        gdc_launch_dependents()

    r = row[:, None]
    c = tl.arange(0, 16)[None, :]
    place = ((r // 16 * 2 + c // 8) * 32 + r % 8 * 4 + c % 4) * 4 + c // 4 % 2 * 2 + r // 8 % 2
    word_ptrs = words_ptr + place
    tile_words = rows * 16
    no = place * 0
    words = ()
    scales = ()
    zeros = ()
    for i in tl.static_range(AHEAD):
        valid = no + (first + i < last).to(tl.int32)
        words = words + (_load_words(word_ptrs + (first + i) * tile_words, valid, ASSEMBLY),)
        at = tl.minimum(first + i, last - 1) * rows + row
        if GROUPED:
            scales = scales + (_load_small(scales_ptr + at, ASSEMBLY),)
        if HAS_ZEROS:
            zeros = zeros + (_load_small(zeros_ptr + at, ASSEMBLY),)
    if FOLLOWED:
        index = out_tile * split + part
        piece = index % next_parts
        start = piece * next_tiles // next_parts * next_rows
        skipped = index // next_parts * next_bytes
        thread = tl.arange(0, THREADS)
        next_words = next_words_ptr + start * 16 + skipped // 4
        next_scales = next_scales_ptr + start + skipped // 64
        send_at = tl.where(m_tile == 0, tl.maximum(first, last - 1 - AHEAD), -1)
    if DEPENDENT:
        gdc_wait()

    acc = tl.zeros([BLOCK_OUT, BLOCK_M], tl.float32)
    column = tl.arange(0, 128)
    x_ptrs = x_ptr + token[:, None] * x_stride + column[None, :]
    zero = tl.full([BLOCK_OUT], 8, tl.int32)
    scale = tl.full([BLOCK_OUT], 1.0, tl.float32)
    for tile in range(first, last):
        mask = is_token[:, None]
        if not EVEN_K:
            mask = mask & (column < num_in - tile * 128)[None, :]
        x = tl.trans(tl.load(x_ptrs + tile * 128, mask=mask, other=0.0).to(dtype))
        coming = tile + AHEAD
        at = tl.minimum(coming, last - 1) * rows + row
        if HAS_ZEROS:
            zero = zeros[0]
        if GROUPED:
            scale = _scale_of(scales[0], SCALES_BF16)
        now = words[0]
        later = ()
        later_scales = ()
        later_zeros = ()
        for i in tl.static_range(1, AHEAD):
            later = later + (_keep(words[i], ASSEMBLY),)
            if GROUPED:
                later_scales = later_scales + (_keep(scales[i], ASSEMBLY),)
            if HAS_ZEROS:
                later_zeros = later_zeros + (_keep(zeros[i], ASSEMBLY),)
        valid = no + (coming < last).to(tl.int32)
        words = later + (_load_words(word_ptrs + coming * tile_words, valid, ASSEMBLY),)
        if GROUPED:
            scales = later_scales + (_load_small(scales_ptr + at, ASSEMBLY),)
        if HAS_ZEROS:
            zeros = later_zeros + (_load_small(zeros_ptr + at, ASSEMBLY),)
        if FOLLOWED:
            wanted = tl.where((thread == 0) & (tile == send_at), next_bytes, 0)
            _prefetch(next_words, wanted)
            _prefetch(next_scales, wanted // 32)
        operand = _operand(now, zero, scale, dtype, SCALED, ASSEMBLY, BLOCK_OUT)
        if GROUPED and not SCALED:
            acc += tl.dot(operand, x) * scale[:, None]
        else:
            acc = tl.dot(operand, x, acc)
    if not GROUPED:
        acc *= tl.load(scales_ptr + row)[:, None]

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
def widen_fragments_kernel(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,  # [num_rows, num_in] of the weights from first_row on, contiguous
    first_row,  # a multiple of 16
    num_rows,
    num_in,
    rows,
    BLOCK_OUT: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SCALES_BF16: tl.constexpr,
):
    """Widen one tile of inputs and BLOCK_OUT rows; the tables are those of fragment_linear_kernel."""
    tile = tl.program_id(0)
    local = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = first_row + local
    # A spare part of a block may lie behind the last row.
    stored = tl.minimum(row, rows - 1)
    begin = (tile * rows + first_row + tl.program_id(1) * BLOCK_OUT) * 16
    place = begin + tl.arange(0, BLOCK_OUT * 16)
    words = tl.load(words_ptr + place, mask=place < (tile + 1) * (rows * 16), other=0)
    # [16 rows, 8 words, row of 8, thread of 4, half of the words, half of the rows] -> [rows, words]
    words = tl.reshape(words, [BLOCK_OUT // 16, 2, 8, 4, 2, 2])
    words = tl.reshape(tl.permute(words, (0, 5, 2, 1, 4, 3)), [BLOCK_OUT, 16])
    if GROUPED:
        scale = _scale_of(_load_small(scales_ptr + tile * rows + stored, False), SCALES_BF16)
    else:
        scale = tl.load(scales_ptr + stored)
    zero = tl.full([BLOCK_OUT], 8, tl.int32)
    if HAS_ZEROS:
        zero = _load_small(zeros_ptr + tile * rows + stored, False)
    weights = _operand(words, zero, scale, tl.float32, True, False, BLOCK_OUT)
    column = tile * 128 + tl.arange(0, 128)
    mask = (local < num_rows)[:, None] & (column < num_in)[None, :]
    out_ptrs = out_ptr + local[:, None] * num_in + column[None, :]
    tl.store(out_ptrs, weights.to(out_ptr.dtype.element_ty), mask=mask)
