"""Ragged attention over paged keys and values in Triton: one launch a layer, whatever the chunks.

A program takes one item of `work.py` for one key-value head: up to `rows` pairs of (token, query head of
the group) against a range of keys, with an online softmax. Keys are masked by position alone, so prefill,
decode, verification and shared prefixes are one code. Wide items use the big matrix instructions; narrow
ones, decode, wait for memory whatever they compute.

A token in several items leaves its parts in scratch memory. Whoever finishes a row's last part, as the
row's counter tells, merges all of them in the order of their numbers and sets the counter back to zero.

Sources: online softmax (Milakov and Gimelshein 2018), FlashAttention-2 (Dao 2023), Flash-Decoding (Dao et
al. 2023), PagedAttention (Kwon et al. 2023).
"""

# Triton's own types know nothing of kernels.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from polybatch.kernels.ragged_attention.work import Heads, Limits, Tiles

LOG2_E = 1.4426950408889634


@triton.jit
def _turns(
    q, m, total, acc, low, high, end, position, pool, page_stride, table, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, V_OFFSET: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys low to high, KEYS a turn; unmasked turns are seen whole by every row."""
    d = tl.arange(0, D_PAD)
    offset = tl.arange(0, KEYS)
    # Page ids are read a turn ahead: the pipeline then waits for one load, not for one after the other.
    page = tl.load(table + (low + offset) // PAGE, mask=low + offset < high, other=0)
    for start in range(low, high, KEYS):
        key = start + offset
        at = pool + (page.to(tl.int64) * page_stride + (key % PAGE) * D)[:, None] + d[None, :]
        page = tl.load(table + (key + KEYS) // PAGE, mask=key + KEYS < high, other=0)
        # Slots past the end may hold NaN, which a weight of zero would not silence.
        held = (key < end)[:, None] & (d < D)[None, :]
        if MASKED:
            k = tl.load(at, mask=held, other=0.0)
        elif D < D_PAD:
            k = tl.load(at, mask=(d < D)[None, :], other=0.0)
        else:
            k = tl.load(at)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            seen = (key[None, :] <= position[:, None]) & (key < end)[None, :]
            if WINDOW > 0:
                seen &= key[None, :] > position[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(m, tl.max(scores, 1) * scale)
        if MASKED:
            # A row that has seen nothing yet keeps -inf; its exponents use 0 instead.
            base = tl.where(top == float("-inf"), 0.0, top)
        else:
            base = top
        weights = tl.exp2(scores * scale - base[:, None])
        correction = tl.exp2(m - base)
        total = total * correction + tl.sum(weights, 1)
        acc = acc * correction[:, None]
        if MASKED:
            v = tl.load(at + V_OFFSET, mask=held, other=0.0)
        elif D < D_PAD:
            v = tl.load(at + V_OFFSET, mask=(d < D)[None, :], other=0.0)
        else:
            v = tl.load(at + V_OFFSET)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        m = top
    return m, total, acc


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
    out_ptr, lse_ptr, partial, partial_lse, first, num_parts, rows, token, head,
    H: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, HAS_LSE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Join the parts of the chosen rows."""
    # As many columns at a time as leave registers for four parts, each of which is a wait for memory.
    COLUMNS: tl.constexpr = min(D_PAD, 2048 // ROWS)
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
        _store(acc, m, total, out_ptr, lse_ptr, rows, token, head, d, H, D, HAS_LSE)


@triton.jit
def _store(
    acc, m, total, out_ptr, lse_ptr, rows, token, head, d,
    H: tl.constexpr, D: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Final results of the chosen rows; one that saw no key is zero, its lse -inf."""
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    at = (token.to(tl.int64) * (H * D) + head * D)[:, None] + d[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=rows[:, None] & (d < D)[None, :])
    if HAS_LSE:
        tl.store(lse_ptr + token * H + head, _log_sum(m, total) * 0.6931471805599453, mask=rows)


@triton.jit
def _attend_item(
    q_ptr, q_stride, out_ptr, lse_ptr, pool, page_stride, table, positions, item, tokens, parts,
    partial, partial_lse, counters, kv_head, scale,
    H: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, HAS_LSE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SPLIT_LOOP: tl.constexpr,
):  # fmt: skip
    """One item for one key-value head."""
    G: tl.constexpr = H // KH
    first = tl.load(item)
    num_tokens = tl.load(item + 1)
    begin = tl.load(item + 3)
    end = tl.load(item + 4)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, D_PAD)
    rows = r // G < num_tokens
    token = tl.load(tokens + first + r // G, mask=rows, other=0)
    position = tl.load(positions + token, mask=rows, other=-1)
    head = kv_head * G + r % G
    cells = rows[:, None] & (d < D)[None, :]
    q_at = (token.to(tl.int64) * q_stride + head * D)[:, None] + d[None, :]
    q = tl.load(q_ptr + q_at, mask=cells, other=0.0)

    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    pool += kv_head * PAGE * D
    V_OFFSET: tl.constexpr = KH * PAGE * D
    masked_from = begin
    if SPLIT_LOOP and WINDOW == 0:
        # Keys up to the earliest of the item's positions are seen by all of its rows.
        seen_by_all = tl.min(tl.where(rows, position, end), 0) + 1
        whole_turns = tl.maximum(tl.minimum(seen_by_all, end) - begin, 0) // KEYS
        masked_from = begin + whole_turns * KEYS
        m, total, acc = _turns(
            q, m, total, acc, begin, masked_from, end, position, pool, page_stride, table, scale,
            D, D_PAD, V_OFFSET, PAGE, WINDOW, KEYS, False,
        )  # fmt: skip
    m, total, acc = _turns(
        q, m, total, acc, masked_from, end, end, position, pool, page_stride, table, scale,
        D, D_PAD, V_OFFSET, PAGE, WINDOW, KEYS, True,
    )  # fmt: skip

    if tl.load(item + 6) < 2:
        _store(acc, m, total, out_ptr, lse_ptr, rows, token, head, d, H, D, HAS_LSE)
    else:
        part = tl.load(item + 5)
        first_part = tl.load(parts + 2 * token, mask=rows, other=0)
        num_parts = tl.load(parts + 2 * token + 1, mask=rows, other=0)
        at = (first_part + part).to(tl.int64) * H + head
        out = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(partial + at[:, None] * D + d[None, :], out, mask=cells)
        tl.store(partial_lse + at, _log_sum(m, total), mask=rows)
        # All threads' parts are written before any counter says so.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + token * H + head, 1, mask=rows, sem="acq_rel", scope="gpu")
        last = rows & (arrived == num_parts - 1)
        if tl.max(last.to(tl.int32), 0) > 0:
            tl.store(counters + token * H + head, 0, mask=last)
            _merge(
                out_ptr, lse_ptr, partial, partial_lse, first_part, num_parts, last, token, head,
                H, D, D_PAD, HAS_LSE, ROWS,
            )  # fmt: skip


# The step's arrays lie anywhere in one buffer: their alignment must not decide what is compiled.
@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=[
        "table_ptr", "positions_ptr", "num_items_ptr", "items_ptr", "tokens_ptr", "parts_ptr",
    ],
)  # fmt: skip
def ragged_attention_kernel(
    q_ptr, q_stride, out_ptr, lse_ptr, pool_ptr, page_stride, table_ptr, table_stride, positions_ptr,
    num_items_ptr, items_ptr, tokens_ptr, parts_ptr, partial_ptr, partial_lse_ptr, counters_ptr, scale,
    H: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, HAS_LSE: tl.constexpr, NARROW_ROWS: tl.constexpr, NARROW_KEYS: tl.constexpr,
    WIDE_ROWS: tl.constexpr, WIDE_KEYS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid: room for items times key-value heads. A kind of item with 0 rows is compiled without."""
    program = tl.program_id(0)
    index = program // KH
    num_items = tl.load(num_items_ptr)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    if index >= num_items:
        return
    kv_head = program % KH
    item = items_ptr + index * 8
    table = table_ptr + tl.load(item + 2).to(tl.int64) * table_stride
    is_wide = tl.load(item + 6) % 2 == 1
    if WIDE_ROWS > 0:  # noqa: SIM102 the outer condition is known when compiling
        if is_wide or NARROW_ROWS == 0:
            _attend_item(
                q_ptr, q_stride, out_ptr, lse_ptr, pool_ptr, page_stride, table, positions_ptr, item,
                tokens_ptr, parts_ptr, partial_ptr, partial_lse_ptr, counters_ptr, kv_head, scale,
                H, KH, D, D_PAD, PAGE, WINDOW, HAS_LSE, WIDE_ROWS, WIDE_KEYS, True,
            )  # fmt: skip
    if NARROW_ROWS > 0:  # noqa: SIM102
        if not is_wide or WIDE_ROWS == 0:
            _attend_item(
                q_ptr, q_stride, out_ptr, lse_ptr, pool_ptr, page_stride, table, positions_ptr, item,
                tokens_ptr, parts_ptr, partial_ptr, partial_lse_ptr, counters_ptr, kv_head, scale,
                H, KH, D, D_PAD, PAGE, WINDOW, HAS_LSE, NARROW_ROWS, NARROW_KEYS, False,
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
        return Tiles(narrow_keys=keys, wide_rows=rows, wide_keys=keys, num_warps=warps, num_stages=2)
    if padded > 128:
        return Tiles(narrow_keys=32, wide_keys=32, num_stages=2)
    return Tiles()


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
    max_items: int | None = None,
    has_narrow: bool = True,
    has_wide: bool = True,
    is_dependent: bool = False,
) -> None:
    """Attend the items of a plan; allocates nothing, so a graph can capture it.

    q: [T, H, D], rotated, or a view of rows that lie q.stride(0) apart. out: [T, H * D] contiguous, any
        float dtype; rows in no item are not written.
    kv_pages: [num_pages, at least 2 * KH * page_size * D], one layer's pages, contiguous within a page,
        as [2, KH, page_size, D] with keys first.
    page_table: [S, P] int32. positions: [T] int32. work: the arrays of `work.arrays` on the device.
    max_items: at least the plan's items, their array's length by default: one program for each and
        key-value head starts, and ends at once where there is no item.
    has_narrow, has_wide: False leaves out the code of items that the plan has none of.
    lse: [T, H] float32 contiguous or None, natural logarithm as in the package's contract.
    is_dependent: start while the kernel before ends (programmatic dependent launch); `work` must have been
        on the device before that one began.
    """
    items = work["attention_items"]
    count = items.shape[0] if max_items is None else max_items
    if not count:
        return
    ragged_attention_kernel[(count * heads.num_kv_heads,)](
        q,
        q.stride(0),
        out,
        out if lse is None else lse,
        kv_pages,
        kv_pages.stride(0),
        page_table,
        page_table.stride(0),
        positions,
        work["attention_num_items"],
        items,
        work["attention_tokens"],
        work["attention_parts"],
        scratch.out,
        scratch.lse,
        scratch.counters,
        scale * LOG2_E,
        H=heads.num_heads,
        KH=heads.num_kv_heads,
        D=heads.head_dim,
        D_PAD=_padded(heads),
        PAGE=page_size,
        WINDOW=window or 0,
        HAS_LSE=lse is not None,
        NARROW_ROWS=tiles.narrow_rows if has_narrow else 0,
        NARROW_KEYS=tiles.narrow_keys,
        WIDE_ROWS=tiles.wide_rows if has_wide else 0,
        WIDE_KEYS=tiles.wide_keys,
        DEPENDENT=is_dependent,
        launch_pdl=is_dependent,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
