"""Ragged attention over paged keys and values in Triton: a launch a layer for each kind of item.

A program takes one item of `work.py` for one key-value head: up to `rows` pairs of (token, query head of
the group) against a range of keys, with an online softmax. Keys are masked by position alone, so prefill,
decode, verification and shared prefixes are one code, compiled twice: wide items use the big matrix
instructions; narrow ones, decode, wait for memory whatever they compute.

With programmatic dependent launch a program reads what the host planned while the kernel before ends.
Where a step has items of both kinds, the narrow ones start as soon as all wide ones have, and fill the
room that these leave on the SMs; the last of them waits for the wide ones, so that the launch ends last.

A token in several items leaves its parts in scratch memory. Whoever finishes a row's last part, as the
row's counter tells, merges all of them in the order of their numbers and sets the counter back to zero.
Where decoding rows share a prefix, a launch of its own merges instead: programs then neither count nor wait
for their parts to be written, and without code that merges they need fewer registers. On Hopper GPUs the wide
items of such steps go to `hopper.py`, whose programs fill half of the SMs, and narrow ones have the rest.

Sources: online softmax (Milakov and Gimelshein 2018), FlashAttention-2 (Dao 2023), Flash-Decoding (Dao et
al. 2023), PagedAttention (Kwon et al. 2023).
"""

# Triton's own types know nothing of kernels.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from polybatch.kernels.gluon import runs_hopper_kernels
from polybatch.kernels.ragged_attention.turns import page_turns, turns
from polybatch.kernels.ragged_attention.work import Heads, Limits, SharedTiles, Tile, Tiles

LOG2_E = 1.4426950408889634
# How a launch starts: after the kernel before; while that one ends; beside it, which started so itself.
AFTER, DEPENDENT, BESIDE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MERGE_ROWS, MERGE_WARPS = 8, 2  # small programs: all of 256 rows run at once
# For 16-bit types and head dims up to 128; chosen by benchmarks/cuda/attention_prefix.py on an H100.
SHARED = SharedTiles(
    narrow=Tile(16, 32, num_stages=2, programs_per_sm=4, max_registers=64, prefetch=True),
    wide=Tile(128, 32, num_warps=8, num_stages=4, max_registers=128, prefetch=True),
)
SHARED_HOPPER = replace(
    SHARED,
    narrow=Tile(16, 32, num_warps=1, num_stages=3, programs_per_sm=6, max_registers=168),
    pipelined=Tile(128, 64, num_stages=4, programs_per_sm=1),
)


@triton.jit
def _log_sum(m, total):
    """To base 2."""
    return tl.where(total > 0, m + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))


@triton.jit
def _load_part(
    partial, partial_lse, first, num_parts, part, rows, head, d, H: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """One part of the rows that have it. Other programs wrote it: past the L1 cache, which may be stale."""
    here = rows & (part < num_parts)
    at = (first + part).to(tl.int64) * H + head
    lse = tl.load(partial_lse + at, mask=here, other=float("-inf"), cache_modifier=".cg")
    out_at = at[:, None] * D + d[None, :]
    cells = here[:, None] & (d < D)[None, :]
    return tl.load(partial + out_at, mask=cells, other=0.0, cache_modifier=".cg"), lse


@triton.jit
def _merge(
    to, lse_ptr, partial, partial_lse, first, num_parts, rows, token, head,
    H: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, HAS_LSE: tl.constexpr, ROWS: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Join the parts of the chosen rows. to: out and its stride."""
    # As many columns at a time as leave registers for four parts, each of which is a wait for memory.
    COLUMNS: tl.constexpr = min(D_PAD, WARPS * 512 // ROWS)
    most = tl.max(tl.where(rows, num_parts, 0), 0)
    for column in range(0, D_PAD, COLUMNS):
        d = column + tl.arange(0, COLUMNS)
        m = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for p in range(0, most, 4):
            out0, lse0 = _load_part(partial, partial_lse, first, num_parts, p, rows, head, d, H, D)
            out1, lse1 = _load_part(partial, partial_lse, first, num_parts, p + 1, rows, head, d, H, D)
            out2, lse2 = _load_part(partial, partial_lse, first, num_parts, p + 2, rows, head, d, H, D)
            out3, lse3 = _load_part(partial, partial_lse, first, num_parts, p + 3, rows, head, d, H, D)
            top = tl.maximum(m, tl.maximum(tl.maximum(lse0, lse1), tl.maximum(lse2, lse3)))
            base = tl.where(top == float("-inf"), 0.0, top)
            w0, w1 = tl.exp2(lse0 - base), tl.exp2(lse1 - base)
            w2, w3 = tl.exp2(lse2 - base), tl.exp2(lse3 - base)
            correction = tl.exp2(m - base)
            acc = acc * correction[:, None] + out0 * w0[:, None] + out1 * w1[:, None]
            acc += out2 * w2[:, None] + out3 * w3[:, None]
            total = total * correction + ((w0 + w1) + (w2 + w3))
            m = top
        _store(acc, m, total, to, lse_ptr, rows, token, head, d, H, D, HAS_LSE)


@triton.jit
def _store(
    acc, m, total, to, lse_ptr, rows, token, head, d,
    H: tl.constexpr, D: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Final results of the chosen rows; one that saw no key is zero, its lse -inf."""
    out_ptr, out_stride = to
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    at = (token.to(tl.int64) * out_stride + head * D)[:, None] + d[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=rows[:, None] & (d < D)[None, :])
    if HAS_LSE:
        tl.store(lse_ptr + token * H + head, _log_sum(m, total) * 0.6931471805599453, mask=rows)


@triton.jit
def _prefetch(rows, D: tl.constexpr, D_PAD: tl.constexpr):
    """Bring rows of D numbers to the L2 cache, a line of 128 bytes by each thread."""
    LINE: tl.constexpr = 128 * 8 // rows.dtype.element_ty.primitive_bitwidth
    line = tl.minimum(tl.arange(0, max(1, D_PAD // LINE)) * LINE, D - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [rows[:, None] + line[None, :]],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _tokens_of(first, num_tokens, is_group, tokens, G: tl.constexpr, ROWS: tl.constexpr):
    """Each row's token, and whether it has one. A chunk's tokens stand in a row, a group's are listed."""
    i = tl.arange(0, ROWS) // G
    rows = i < num_tokens
    token = first + i
    if is_group:
        token = tl.load(tokens + token, mask=rows, other=0)
    return token, rows


@triton.jit
def _parts_of(token, rows, parts):
    """Each row's first part, and how many it has."""
    at = parts + 2 * token
    return tl.load(at, mask=rows, other=0), tl.load(at + 1, mask=rows, other=0)


@triton.jit
def _run_item(
    program, q_ptr, q_stride, to, lse_ptr, pool_ptr, page_stride, table_ptr, table_stride, positions_ptr,
    num_items, items_ptr, tokens_ptr, parts_ptr, partial_ptr, partial_lse_ptr, counters_ptr, scale,
    H: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, HAS_LSE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    START: tl.constexpr, WARPS: tl.constexpr, PREFETCH: tl.constexpr, MERGE_APART: tl.constexpr,
):  # fmt: skip
    """An item for one key-value head, or nothing where there is none of this number."""
    G: tl.constexpr = H // KH
    V_OFFSET: tl.constexpr = KH * PAGE * D
    kv_head = program % KH
    # What the host planned. Loads depend on each other as little as can be: each is a wait for memory.
    item = items_ptr + program // KH * 8
    first, num_tokens, row = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    begin, end, part = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
    flags, first_position = tl.load(item + 6), tl.load(item + 7)
    is_item = program // KH < num_items
    is_part = is_item & (flags % 2 == 1)
    is_group = is_item & (flags >= 2)
    token, rows = _tokens_of(first, tl.where(is_item, num_tokens, 0), is_group, tokens_ptr, G, ROWS)
    position = first_position + tl.arange(0, ROWS) // G
    if WINDOW > 0:  # noqa: SIM102 a window may hide some of a prefix from some of its group
        if is_group:
            position = tl.load(positions_ptr + token, mask=rows, other=0)
    table = table_ptr + row.to(tl.int64) * table_stride
    key = begin + tl.arange(0, KEYS)
    page = tl.load(table + key // PAGE, mask=is_item & (key < end), other=0)
    parts_early: tl.constexpr = ROWS <= 16  # larger tiles have no registers to keep them in
    if parts_early:
        first_part, num_parts = _parts_of(token, rows & is_part, parts_ptr)

    if PREFETCH and START != AFTER:  # noqa: SIM102 the outer condition is known when compiling
        if is_item:
            first_keys = pool_ptr + kv_head * PAGE * D + page.to(tl.int64) * page_stride + (key % PAGE) * D
            _prefetch(first_keys, D, D_PAD)
            _prefetch(first_keys + V_OFFSET, D, D_PAD)
    # Those with work wait, and one program always: whoever starts next relies on it. The rest make room.
    if START == DEPENDENT:
        if is_item | (program == 0):
            gdc_wait()
        gdc_launch_dependents()
    if START == BESIDE and MERGE_APART:
        gdc_launch_dependents()
    if is_item:
        d = tl.arange(0, D_PAD)
        head = kv_head * G + tl.arange(0, ROWS) % G
        cells = rows[:, None] & (d < D)[None, :]
        q_at = (token.to(tl.int64) * q_stride + head * D)[:, None] + d[None, :]
        q = tl.load(q_ptr + q_at, mask=cells, other=0.0)
        pool = pool_ptr + kv_head * PAGE * D
        if WARPS == 1 and KEYS == 2 * PAGE and WINDOW == 0 and D_PAD == D:
            m, total, acc = page_turns(
                q, begin, end, position, pool, page_stride, table, scale, D, V_OFFSET, PAGE, ROWS
            )
        else:
            m, total, acc = turns(
                q, page, begin, end, tl.minimum(first_position + 1, end), position, pool, page_stride, table,
                scale, D, D_PAD, V_OFFSET, PAGE, WINDOW, ROWS, KEYS,
            )  # fmt: skip
        if not parts_early:
            first, num_tokens = tl.load(item), tl.load(item + 1)
            part, flags = tl.load(item + 5), tl.load(item + 6)
            is_part, is_group = flags % 2 == 1, flags >= 2
            head = kv_head * G + tl.arange(0, ROWS) % G
            token, rows = _tokens_of(first, num_tokens, is_group, tokens_ptr, G, ROWS)
            first_part, num_parts = _parts_of(token, rows & is_part, parts_ptr)
        if is_part:
            at = (first_part + part).to(tl.int64) * H + head
            out = acc / tl.where(total > 0, total, 1.0)[:, None]
            tl.store(partial_ptr + at[:, None] * D + d[None, :], out, mask=rows[:, None] & (d < D)[None, :])
            tl.store(partial_lse_ptr + at, _log_sum(m, total), mask=rows)
            if not MERGE_APART:
                # All threads' parts are written before any counter says so.
                tl.debug_barrier()
                counter = counters_ptr + token * H + head
                arrived = tl.atomic_add(counter, 1, mask=rows, sem="acq_rel", scope="gpu")
                last = rows & (arrived == num_parts - 1)
                if tl.max(last.to(tl.int32), 0) > 0:
                    tl.store(counter, 0, mask=last)
                    _merge(
                        to, lse_ptr, partial_ptr, partial_lse_ptr, first_part, num_parts, last, token,
                        head, H, D, D_PAD, HAS_LSE, ROWS, WARPS,
                    )  # fmt: skip
        else:
            _store(acc, m, total, to, lse_ptr, rows, token, head, d, H, D, HAS_LSE)


# The step's arrays lie anywhere in one buffer: their alignment must not decide what is compiled.
@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=[
        "table_ptr", "positions_ptr", "num_items_ptr", "items_ptr", "tokens_ptr", "parts_ptr",
    ],
)  # fmt: skip
def ragged_attention_kernel(
    q_ptr, q_stride, out_ptr, out_stride, lse_ptr, pool_ptr, page_stride, table_ptr, table_stride,
    positions_ptr, num_items_ptr, items_ptr, tokens_ptr, parts_ptr, partial_ptr, partial_lse_ptr,
    counters_ptr, scale,
    H: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, HAS_LSE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    START: tl.constexpr, WARPS: tl.constexpr, PREFETCH: tl.constexpr, MERGE_APART: tl.constexpr,
    LOOP: tl.constexpr,
):  # fmt: skip
    """Grid: room for items of one kind times key-value heads, or any with LOOP. START: see above."""
    program = tl.program_id(0)
    to = (out_ptr, out_stride)
    num_items = tl.load(num_items_ptr)
    if LOOP:
        for at in range(program, tl.maximum(num_items * KH, 1), tl.num_programs(0)):
            _run_item(
                at, q_ptr, q_stride, to, lse_ptr, pool_ptr, page_stride, table_ptr, table_stride,
                positions_ptr, num_items, items_ptr, tokens_ptr, parts_ptr, partial_ptr, partial_lse_ptr,
                counters_ptr, scale, H, KH, D, D_PAD, PAGE, WINDOW, HAS_LSE, ROWS, KEYS, START, WARPS,
                PREFETCH, MERGE_APART,
            )  # fmt: skip
    else:
        _run_item(
            program, q_ptr, q_stride, to, lse_ptr, pool_ptr, page_stride, table_ptr, table_stride,
            positions_ptr, num_items, items_ptr, tokens_ptr, parts_ptr, partial_ptr, partial_lse_ptr,
            counters_ptr, scale, H, KH, D, D_PAD, PAGE, WINDOW, HAS_LSE, ROWS, KEYS, START, WARPS, PREFETCH,
            MERGE_APART,
        )  # fmt: skip
    if START == BESIDE:  # noqa: SIM102 the outer condition is known when compiling
        if program == tl.num_programs(0) - 1:
            gdc_wait()


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["parts_ptr"])
def merge_parts_kernel(
    out_ptr, out_stride, lse_ptr, partial_ptr, partial_lse_ptr, parts_ptr, num_rows,
    H: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, HAS_LSE: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Join the parts of rows, one for each token and head, that have more than one. Grid: rows over ROWS."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = row // H, row % H
    first_part, num_parts = _parts_of(token, row < num_rows, parts_ptr)
    if START == DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    _merge(
        (out_ptr, out_stride), lse_ptr, partial_ptr, partial_lse_ptr, first_part, num_parts,
        num_parts > 1, token, head, H, D, D_PAD, HAS_LSE, ROWS, WARPS,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scratch:
    """Device memory that all layers' launches share, one after the other on a stream.

    out: [max_partials, H, D] float32. lse: [max_partials, H] float32, to base 2.
    counters: [max_tokens, H] int32, zero before and after every launch.
    """

    out: torch.Tensor
    lse: torch.Tensor
    counters: torch.Tensor


def make_scratch(heads: Heads, limits: Limits, device: torch.device | str) -> Scratch:
    """Allocate what plans within the limits need."""
    rows = (limits.max_partials, heads.num_heads)
    return Scratch(
        out=torch.empty(*rows, heads.head_dim, dtype=torch.float32, device=device),
        lse=torch.empty(rows, dtype=torch.float32, device=device),
        counters=torch.zeros(limits.max_tokens, heads.num_heads, dtype=torch.int32, device=device),
    )


def choose_tiles(heads: Heads, dtype: torch.dtype) -> Tiles:
    """The fixed configuration of a shape."""
    padded = _padded(heads)
    if dtype.itemsize == 4:  # without matrix instructions, tiles must fit in registers
        keys, rows = (16, 16) if padded > 128 else (32, 32)
        warps = 8 if padded > 64 else 4
        return Tiles(
            narrow=Tile(16, keys, num_warps=warps, num_stages=2),
            wide=Tile(rows, keys, num_warps=warps, num_stages=2),
        )
    if padded > 128:
        return Tiles(narrow=Tile(16, 32, num_stages=2), wide=Tile(64, 32, num_stages=2))
    tiles = Tiles()
    if padded > heads.head_dim:  # masks take registers
        return replace(
            tiles,
            narrow=replace(tiles.narrow, max_registers=None),
            wide=replace(tiles.wide, max_registers=None),
        )
    is_pipelined = heads.head_dim == 128 and runs_hopper_kernels()
    return replace(tiles, shared=SHARED_HOPPER if is_pipelined else SHARED)


def _padded(heads: Heads) -> int:
    """Blocks of Triton are powers of two."""
    return max(16, 1 << (heads.head_dim - 1).bit_length())


def ragged_attention(
    q: torch.Tensor,
    out: torch.Tensor,
    kv_pages: torch.Tensor,
    page_table: torch.Tensor,
    positions: torch.Tensor,
    work: Mapping[str, torch.Tensor],
    scratch: Scratch,
    heads: Heads,
    tiles: Tiles,
    *,
    scale: float,
    page_size: int,
    window: int | None = None,
    lse: torch.Tensor | None = None,
    max_narrow: int | None = None,
    max_wide: int | None = None,
    is_dependent: bool = False,
    is_decode: bool = False,
    num_sms: int | None = None,
) -> None:
    """Attend the items of a plan; allocates nothing, so a graph can capture it.

    q: [T, H, D], rotated, or a view of rows that lie q.stride(0) apart. out: [T, H * D], any float
        dtype, rows may be strided; those in no item are not written.
    kv_pages: [num_pages, at least 2 * KH * page_size * D], one layer's pages, contiguous within a page,
        as [2, KH, page_size, D] with keys first.
    page_table: [S, P] int32. positions: [T] int32. work: the arrays of `work.arrays` on the device.
    max_narrow, max_wide: at least the plan's items of each kind, their array's length by default: one
        program for each and key-value head starts, and ends at once where there is no item. 0 leaves the
        kind's launch out.
    lse: [T, H] float32 contiguous or None, natural logarithm as in the package's contract.
    is_dependent: start while the kernel before ends (programmatic dependent launch). `work`, positions and
        page_table, and the pages of prefixes that are shared, must have been on the device before that kernel
        began; q and other pages are read, and out written, after its end.
    is_decode: chunks are short and only shared prefixes are wide: take `tiles.shared` where there are both.
    num_sms: of the device; no more wide programs of `tiles.shared` start, all of which narrow ones await.
    """
    num_narrow = work["attention_narrow_items"].shape[0] if max_narrow is None else max_narrow
    num_wide = work["attention_wide_items"].shape[0] if max_wide is None else max_wide
    has_both = num_narrow > 0 and num_wide > 0
    merge_apart = is_decode and has_both and tiles.shared is not None
    pair = tiles.shared if merge_apart and tiles.shared is not None else tiles
    pipelined = tiles.shared.pipelined if tiles.shared is not None and window is None else None
    first, second = (DEPENDENT, BESIDE) if is_dependent else (AFTER, AFTER)
    sizes = {"H": heads.num_heads, "D": heads.head_dim, "D_PAD": _padded(heads), "HAS_LSE": lse is not None}
    lse = out if lse is None else lse
    for count, index, items, tile, start in (
        (num_wide, 1, "attention_wide_items", pair.wide, first),
        (num_narrow, 0, "attention_narrow_items", pair.narrow, second if has_both else first),
    ):
        if not count:
            continue
        is_looped = merge_apart and index == 1
        num_programs = count * heads.num_kv_heads
        if is_looped and num_sms is not None:
            num_programs = min(num_programs, num_sms)
        rows = (q, q.stride(0), out, out.stride(0), lse)
        pages = (kv_pages, kv_pages.stride(0), page_table, page_table.stride(0))
        planned = [work["attention_num_items"][index:], work[items]]
        planned += [work["attention_tokens"], work["attention_parts"]]
        if is_looped and pipelined is not None:
            from polybatch.kernels.ragged_attention import hopper  # only where Triton has what it needs

            hopper.wide_attention_kernel[(num_programs,)](
                *rows, *pages, *planned, scratch.out, scratch.lse, scale * LOG2_E,
                H=heads.num_heads, KH=heads.num_kv_heads, D=heads.head_dim, PAGE=page_size,
                HAS_LSE=sizes["HAS_LSE"], ROWS=pipelined.rows, KEYS=pipelined.keys,
                STAGES=pipelined.num_stages, IS_DEPENDENT=is_dependent, launch_pdl=is_dependent,
                num_warps=hopper.WARPS.value, maxnreg=hopper.MAX_REGISTERS,
            )  # fmt: skip
            continue
        ragged_attention_kernel[(num_programs,)](
            *rows, *pages, positions, *planned, scratch.out, scratch.lse, scratch.counters, scale * LOG2_E,
            **sizes, KH=heads.num_kv_heads, PAGE=page_size, WINDOW=window or 0, ROWS=tile.rows,
            KEYS=tile.keys, START=start.value, WARPS=tile.num_warps, PREFETCH=tile.prefetch,
            MERGE_APART=merge_apart, LOOP=is_looped, launch_pdl=is_dependent, num_warps=tile.num_warps,
            num_stages=tile.num_stages, maxnreg=None if window else tile.max_registers,
        )  # fmt: skip
    if merge_apart:
        num_rows = q.shape[0] * heads.num_heads
        merge_parts_kernel[(triton.cdiv(num_rows, MERGE_ROWS),)](
            out, out.stride(0), lse, scratch.out, scratch.lse, work["attention_parts"], num_rows, **sizes,
            ROWS=MERGE_ROWS, WARPS=MERGE_WARPS, START=first.value, launch_pdl=is_dependent,
            num_warps=MERGE_WARPS,
        )  # fmt: skip
