"""int4 linear in which every program takes the same number of steps, wherever tiles end.

Tiles of rows seldom divide evenly among multiprocessors: 448 tiles on 264 places keep a fifth of the device
idle at the end. Here the steps (tile of rows, tile of inputs) form one long list, inputs fastest, and each of
`programs` programs takes an equal stretch of it in one flat loop, so that loads for the next tile are under
way while one ends. A tile that lies in several stretches is summed through scratch memory: whoever arrives
last adds the parts in the order of the inputs. With more programs than tiles this splits the inputs.

The layout and the arithmetic are `cuda_int4`'s. Source: Stream-K (Osama et al. 2023).
"""

# Triton compiles these functions from their source; its own types are not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from polybatch.kernels.linear.cuda_int4 import _add_products, _load_pairs, _load_x, _unit


@triton.jit
def _store_in_place(pointers, values, mask, ASSEMBLY: tl.constexpr):
    """tl.store from whatever layout the values have: no shared memory, which inside the loop buffers fill."""
    if ASSEMBLY:
        if values.dtype == tl.float32:
            values = values.to(tl.int32, bitcast=True)
            tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0; }",
                "=r,l,r,r",
                [pointers, values, mask.to(tl.int32)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        else:
            values = values.to(tl.int16, bitcast=True)
            tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b16 [$1], $2; mov.b32 $0, 0; }",
                "=r,l,h,r",
                [pointers, values, mask.to(tl.int32)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
    else:
        tl.store(pointers, values, mask=mask)


@triton.jit
def _arrive(
    tile,
    parts_ptrs,
    arrived_ptr,
    out_ptr,
    token,
    is_token,
    local,
    num_out,
    out_stride,
    programs,
    total,
    K_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    REDUCED: tl.constexpr,
):
    """Count one part of a tile; if it was the last, add all and store the products."""
    CELLS: tl.constexpr = BLOCK_OUT * BLOCK_M
    # Programs of the tile's first and last steps; to the first of them, it is where its stretch ends.
    first = ((tile * K_TILES + 1) * programs - 1) // total
    last = ((tile * K_TILES + K_TILES) * programs - 1) // total
    if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == last - first:
        sums = tl.zeros([BLOCK_OUT, BLOCK_M], tl.float32)
        # Loads of several parts are under way together; the sum keeps the order of the inputs.
        for base in range(first, last + 1, REDUCED):
            for i in tl.static_range(REDUCED):
                part = base + i
                slot = part * 2 + (part == first).to(tl.int32)
                sums += tl.load(
                    parts_ptrs + slot * CELLS,
                    mask=(local[:, None] * 0 + part) <= last,
                    other=0.0,
                    cache_modifier=".cg",
                )
        row = tile * BLOCK_OUT + local
        tl.store(
            out_ptr + token[:, None] * out_stride + row[None, :],
            tl.trans(sums).to(out_ptr.dtype.element_ty),
            mask=is_token[:, None] & (row < num_out)[None, :],
        )
        tl.store(arrived_ptr + tile, 0)


@triton.jit(do_not_specialize=["num_tokens"])
def int4_stream_kernel(
    x_ptr,  # [num_tokens, num_in], rows x_stride apart
    words_ptr,  # [K_TILES, rows, 64] int16
    scales_ptr,  # GROUPED: [K_TILES + 1, rows] int32, two 16-bit scales each; else [rows] float
    offsets_ptr,  # HAS_ZEROS: [K_TILES + 1, rows] int32, 8 - zero of two groups; else unused
    out_ptr,  # [num_tokens, num_out], rows out_stride apart
    partials_ptr,  # [m tiles, programs, 2, BLOCK_OUT, BLOCK_M] float32: where a stretch begins, and ends
    arrived_ptr,  # [m tiles * out tiles] int32, zero before and after
    num_tokens,
    num_in,
    num_out,
    rows,
    x_stride,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    K_TILES: tl.constexpr,
    REDUCED: tl.constexpr,  # parts of a tile to add at a time
    EVEN_K: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SCALES_BF16: tl.constexpr,
    SHORT: tl.constexpr,  # two shifts fewer in unpacking
    ASSEMBLY: tl.constexpr,
):
    """A stretch of the list of steps for one tile of tokens; there are at least as many steps as programs."""
    # The interpreter does not multiply 16-bit floats rightly.
    dtype: tl.constexpr = x_ptr.dtype.element_ty if ASSEMBLY else tl.float32
    CELLS: tl.constexpr = BLOCK_OUT * BLOCK_M
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    m_tile = tl.program_id(1)
    out_tiles = rows // BLOCK_OUT
    total = out_tiles * K_TILES
    begin = program * total // programs
    end = (program + 1) * total // programs
    token = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = token < num_tokens
    column = tl.arange(0, 64)
    local = tl.arange(0, BLOCK_OUT)
    x_ptrs = x_ptr + token[:, None] * x_stride + column[None, :]
    cell = local[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    parts_ptrs = partials_ptr + m_tile * (programs * 2 * CELLS) + cell
    acc = tl.zeros([BLOCK_OUT, BLOCK_M], tl.float32)
    UNIT: tl.constexpr = _unit(x_ptr.dtype.element_ty, SHORT)
    ones = tl.full([BLOCK_OUT, 64], 1 / UNIT, tl.float32).to(dtype)
    scales = tl.zeros([BLOCK_OUT], tl.int32)
    offsets = tl.zeros([BLOCK_OUT], tl.int32)
    if GROUPED:
        pair = begin % K_TILES * rows + begin // K_TILES * BLOCK_OUT + local
        scales = _load_pairs(scales_ptr + pair, ASSEMBLY)
        if HAS_ZEROS:
            offsets = _load_pairs(offsets_ptr + pair, ASSEMBLY)
    for step in range(begin, end):
        out_tile = step // K_TILES
        tile = step % K_TILES
        row = out_tile * BLOCK_OUT + local
        words = tl.load(words_ptr + tile * (rows * 64) + row[:, None] * 64 + column[None, :])
        at = x_ptrs + tile * 256
        left = num_in - tile * 256
        x0 = tl.trans(_load_x(at, is_token, left, column, dtype, EVEN_K))
        x1 = tl.trans(_load_x(at + 64, is_token, left - 64, column, dtype, EVEN_K))
        x2 = tl.trans(_load_x(at + 128, is_token, left - 128, column, dtype, EVEN_K))
        x3 = tl.trans(_load_x(at + 192, is_token, left - 192, column, dtype, EVEN_K))
        acc = _add_products(
            acc, words, x0, x1, x2, x3, scales, offsets, ones, x_ptr.dtype.element_ty,
            GROUPED, HAS_ZEROS, SCALES_BF16, SHORT, ASSEMBLY,
        )  # fmt: skip
        if GROUPED:
            next_step = tl.minimum(step + 1, end - 1)
            pair = next_step % K_TILES * rows + next_step // K_TILES * BLOCK_OUT + local
            scales = _load_pairs(scales_ptr + pair, ASSEMBLY)
            if HAS_ZEROS:
                offsets = _load_pairs(offsets_ptr + pair, ASSEMBLY)
        if tile == K_TILES - 1:
            if not GROUPED:
                acc *= (tl.load(scales_ptr + row).to(tl.float32) * UNIT)[:, None]
            if begin <= step - tile:
                _store_in_place(
                    out_ptr + token[None, :] * out_stride + row[:, None],
                    acc.to(out_ptr.dtype.element_ty),
                    is_token[None, :] & (row < num_out)[:, None],
                    ASSEMBLY,
                )
            else:
                _store_in_place(parts_ptrs + program * 2 * CELLS, acc, cell >= 0, ASSEMBLY)
            acc = tl.zeros([BLOCK_OUT, BLOCK_M], tl.float32)

    first_tile = begin // K_TILES
    last_tile = (end - 1) // K_TILES
    begins_inside = begin % K_TILES != 0
    ends_inside = end % K_TILES != 0
    if ends_inside:
        if not GROUPED:
            acc *= (tl.load(scales_ptr + last_tile * BLOCK_OUT + local).to(tl.float32) * UNIT)[:, None]
        slot = program * 2 + (begin <= last_tile * K_TILES).to(tl.int32)
        tl.store(parts_ptrs + slot * CELLS, acc)
    # All threads' stores come before the count that publishes them.
    tl.debug_barrier()
    counters = arrived_ptr + m_tile * out_tiles
    if begins_inside:
        _arrive(
            first_tile, parts_ptrs, counters, out_ptr, token, is_token, local, num_out, out_stride,
            programs, total, K_TILES, BLOCK_M, BLOCK_OUT, REDUCED,
        )  # fmt: skip
    if ends_inside & ((first_tile != last_tile) | (begin % K_TILES == 0)):
        _arrive(
            last_tile, parts_ptrs, counters, out_ptr, token, is_token, local, num_out, out_stride,
            programs, total, K_TILES, BLOCK_M, BLOCK_OUT, REDUCED,
        )  # fmt: skip
