"""int4 linear for Hopper in Gluon: the product of `cuda_int4`, from the same layout, from 33 tokens on.

What Triton does not do by itself: weights are unpacked while the matrix unit still multiplies those before,
and copies are the bulk copy engine's (TMA), which one thread asks for. A step covers the 256 inputs of a tile
of words, as four products of 64. Weights go through registers into the matrix unit's left operand; x,
swizzled, is read from shared memory by all groups of four warps. Product j + 1 is unpacked while product j
runs, and registers are written again only after the wait that says their product is done.

x passes through the L2 cache as often as there are tiles of rows: with 64 tokens and tiles of 128 rows that
is twice the weights' bytes. Scales multiply weights, as in `cuda_int4`'s SCALED mode. Symmetric groups of 128
inputs (or multiples) only.

Sources: the PTX ISA on wgmma, TMA and mbarrier; Frantar et al. 2024 (MARLIN) for unpacking beside products.
"""

# Gluon compiles these functions from their source; its own types are not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
# $1 holds two words, $2 their row's scale twice; plane j lies in bits 4 j to 4 j + 3. 0xEA is (a & b) | c.
_UNPACK = """{{
    .reg .b32 a, z;
    shr.u32 a, $1, {shift};
    lop3.b32 $0, a, 0x000F000F, {magic}, 0xEA;
    mov.b32 z, {zero};
    sub.{type} $0, $0, z;
    mul.{type} $0, $0, $2;
}}"""
# 128 and 136 in bfloat16, 1024 and 1032 in float16, twice.
_BF16 = {"type": "bf16x2", "magic": "0x43004300", "zero": "0x43084308"}
_FP16 = {"type": "f16x2", "magic": "0x64006400", "zero": "0x64086408"}
UNPACK_BF16 = gl.constexpr([_UNPACK.format(shift=4 * j, **_BF16) for j in range(4)])
UNPACK_FP16 = gl.constexpr([_UNPACK.format(shift=4 * j, **_FP16) for j in range(4)])


def words_descriptor(words: torch.Tensor, block_out: int) -> TensorDescriptor:
    """Of packed words [k_tiles, rows, 64]: blocks of rows of one tile of inputs."""
    return TensorDescriptor.from_tensor(words.view(-1, 64), [block_out, 64], _SWIZZLED)


def x_descriptor(x: torch.Tensor, block_m: int) -> TensorDescriptor:
    """Of x [tokens, inputs]: blocks of tokens and 256 inputs; what lies outside reads as 0.

    Rows of x's storage behind its last token count as inside, whatever they hold, up to a whole block: no
    sum of theirs is stored, and 33 tokens took up to 1.5 times as long as 64 where zeros were filled in.
    """
    tokens, num_in = x.shape
    elements = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    rows = min(-(-tokens // block_m) * block_m, (elements - num_in) // x.stride(0) + 1)
    return TensorDescriptor(x, [rows, num_in], [x.stride(0), 1], [block_m, 256], _SWIZZLED)


@gluon.jit
def _scales_of(pairs, dtype: gl.constexpr, BF16: gl.constexpr):
    """[R] int32, two 16-bit scales each, the lower half first -> two [R, 1] int16, their bits in `dtype`."""
    held: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    low = (pairs & 0xFFFF).to(gl.int16).to(held, bitcast=True).to(gl.float32).to(dtype)
    high = (pairs >> 16).to(gl.int16).to(held, bitcast=True).to(gl.float32).to(dtype)
    low = gl.expand_dims(low.to(gl.int16, bitcast=True), 1)
    return low, gl.expand_dims(high.to(gl.int16, bitcast=True), 1)


@gluon.jit
def _plane(words, scales, dtype: gl.constexpr, j: gl.constexpr):
    """[R, 64] words -> plane j [R, 64] of weights in `dtype`."""
    bits = gl.inline_asm_elementwise(
        UNPACK_BF16[j] if dtype == gl.bfloat16 else UNPACK_FP16[j],
        "=&r,r,r",
        [words, scales],
        dtype=gl.int16,
        is_pure=False,  # Where it stands, between two products, is the point.
        pack=2,
    )
    return bits.to(dtype, bitcast=True)


@gluon.jit
def _send(words_desc, x_desc, words, x, full, step, tile, row, token, rows, is_wanted, STAGES: gl.constexpr):
    """Ask for the words and x of a tile of inputs, into the buffers of a step."""
    stage = step % STAGES
    barrier = full.index(stage)
    mbarrier.expect(barrier, words_desc.block_type.nbytes + x_desc.block_type.nbytes, is_wanted)
    tma.async_copy_global_to_shared(
        words_desc, [tile * rows + row, 0], barrier, words.index(stage), is_wanted
    )
    tma.async_copy_global_to_shared(x_desc, [token, tile * 256], barrier, x.index(stage), is_wanted)


@gluon.jit
def _store(sums, out_ptr, row0, token0, num_tokens, num_out, out_stride, WARPS: gl.constexpr):
    """[R, M] sums into out [tokens, out], through a layout whose threads hold 8 neighbouring rows."""
    LANES: gl.constexpr = min(32, sums.shape[0] // 8)
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [LANES, 32 // LANES], [1, WARPS], [0, 1])
    row = row0 + gl.arange(0, sums.shape[0], gl.SliceLayout(1, layout))
    token = token0 + gl.arange(0, sums.shape[1], gl.SliceLayout(0, layout))
    values = gl.convert_layout(sums.to(out_ptr.dtype.element_ty), layout)
    mask = (row < num_out)[:, None] & (token < num_tokens)[None, :]
    gl.store(out_ptr + token[None, :] * out_stride + row[:, None], values, mask=mask)


@gluon.jit(do_not_specialize=["num_tokens", "k_tiles"])
def int4_linear_hopper_kernel(
    words_desc,  # [k_tiles * rows, 64] int16
    x_desc,  # [num_tokens, num_in]
    scales_ptr,  # [k_tiles + 1, rows] int32, two 16-bit scales each
    out_ptr,  # [num_tokens, num_out], rows out_stride apart
    partials_ptr,  # [out tiles, m tiles, SPLIT, BLOCK_OUT, BLOCK_M] float32
    arrived_ptr,  # [out tiles * m tiles] int32, zero before and after
    num_tokens,
    num_out,
    rows,
    k_tiles,
    out_stride,
    BLOCK_M: gl.constexpr,
    BLOCK_OUT: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    SCALES_BF16: gl.constexpr,
):
    """One tile [BLOCK_OUT, BLOCK_M] of y^T over one of SPLIT stretches of the inputs."""
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = x_desc.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    out_tile = gl.program_id(1) // SPLIT
    part = gl.program_id(1) % SPLIT
    token0 = gl.program_id(0) * BLOCK_M
    row0 = out_tile * BLOCK_OUT
    first = part * k_tiles // SPLIT
    count = (part + 1) * k_tiles // SPLIT - first
    # Without it, a path around the loop would set the sums by hand, and ptxas serializes all products.
    gl.assume(count > 0)

    words = gl.allocate_shared_memory(gl.int16, [STAGES, BLOCK_OUT, 64], words_desc.layout)
    x = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, 256], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for ahead in gl.static_range(STAGES):
        mbarrier.init(full.index(ahead), count=1)
    for ahead in gl.static_range(STAGES):
        _send(
            words_desc,
            x_desc,
            words,
            x,
            full,
            ahead,
            first + ahead,
            row0,
            token0,
            rows,
            ahead < count,
            STAGES,
        )

    row = row0 + gl.arange(0, BLOCK_OUT, gl.SliceLayout(1, left))
    scale_ptrs = scales_ptr + first * rows + row
    pairs = gl.load(scale_ptrs)
    acc = gl.full([BLOCK_OUT, BLOCK_M], 0.0, gl.float32, mma)
    w3 = gl.full([BLOCK_OUT, 64], 0.0, gl.float32, left).to(dtype)
    for step in range(count):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        packed = words.index(stage).load(left)
        xt = x.index(stage).permute((1, 0))
        low, high = _scales_of(pairs, dtype, SCALES_BF16)
        w0 = _plane(packed, low, dtype, 0)
        running = warpgroup_mma(w0, xt.slice(0, 64), acc, is_async=True)
        acc, w3 = warpgroup_mma_wait(1, [running, w3])
        # All products of the step before are done, everybody's: its buffers can be filled again.
        gl.thread_barrier()
        sent = step - 1 + STAGES
        is_wanted = (step > 0) & (sent < count)
        _send(words_desc, x_desc, words, x, full, sent, first + sent, row0, token0, rows, is_wanted, STAGES)
        # A tile ahead; the table ends with a spare row for that. Sooner, the copies' fence would wait for it.
        scale_ptrs += rows
        pairs = gl.load(scale_ptrs)
        w1 = _plane(packed, low, dtype, 1)
        running = warpgroup_mma(w1, xt.slice(64, 64), acc, is_async=True)
        acc, w0 = warpgroup_mma_wait(1, [running, w0])
        w2 = _plane(packed, high, dtype, 2)
        running = warpgroup_mma(w2, xt.slice(128, 64), acc, is_async=True)
        acc, w1 = warpgroup_mma_wait(1, [running, w1])
        w3 = _plane(packed, high, dtype, 3)
        running = warpgroup_mma(w3, xt.slice(192, 64), acc, is_async=True)
        acc, w2 = warpgroup_mma_wait(1, [running, w2])
    acc, w3 = warpgroup_mma_wait(0, [acc, w3])

    if SPLIT == 1:
        _store(acc, out_ptr, row0, token0, num_tokens, num_out, out_stride, WARPS)
    else:
        CELLS: gl.constexpr = BLOCK_OUT * BLOCK_M
        tile_id = out_tile * gl.num_programs(0) + gl.program_id(0)
        tile_ptr = partials_ptr + tile_id * (SPLIT * CELLS)
        r = gl.arange(0, BLOCK_OUT, gl.SliceLayout(1, mma))
        m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, mma))
        gl.store(tile_ptr + part * CELLS + r[:, None] * BLOCK_M + m[None, :], acc)
        # All threads' stores come before the count that publishes them.
        gl.thread_barrier()
        if gl.atomic_add(arrived_ptr + tile_id, 1, sem="acq_rel") == SPLIT - 1:
            # The last to arrive adds all parts, in the order of the inputs.
            QUADS: gl.constexpr = min(32, BLOCK_M // 4)
            layout: gl.constexpr = gl.BlockedLayout([1, 4], [32 // QUADS, QUADS], [WARPS, 1], [1, 0])
            read_r = gl.arange(0, BLOCK_OUT, gl.SliceLayout(1, layout))
            read_m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))
            cell_ptrs = tile_ptr + read_r[:, None] * BLOCK_M + read_m[None, :]
            total = gl.load(cell_ptrs, cache_modifier=".cg")
            for other in gl.static_range(1, SPLIT):
                total += gl.load(cell_ptrs + other * CELLS, cache_modifier=".cg")
            _store(total, out_ptr, row0, token0, num_tokens, num_out, out_stride, WARPS)
            gl.store(arrived_ptr + tile_id, 0)
