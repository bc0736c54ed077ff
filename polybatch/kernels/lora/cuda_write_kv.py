"""write_kv over y + B h for CUDA: q, k and v get their adapters on the way to rotation and pages.

A program of decode steps and short chunks is some heads of one module, for one to FEW_ROWS rows at once.
Where many rows share an adapter, and in long chunks, it is a tile of tokens, head by head.
y + B h is rounded to the dtype; what follows is `write_kv.cuda`'s.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from polybatch.kernels.lora.cuda_delta import (
    KEEP,
    RECORD_FIRST,
    RECORD_NUM_TOKENS,
    TILE_STRIDE,
    add_block,
    add_rows,
    load_b,
    open_rows,
    open_tile,
)
from polybatch.kernels.lora.work import DENSE, FEW_ROWS
from polybatch.kernels.write_kv.cuda import finish_heads

_DENSE, _FEW_ROWS = tl.constexpr(DENSE), tl.constexpr(FEW_ROWS)


@triton.jit(
    do_not_specialize=["layer", "max_rows"], do_not_specialize_on_alignment=["rows", "positions", "slots"]
)
def write_kv_rows(
    qkv, qkv_stride, positions, slots, table, pages, page_stride, bias, q_norm, k_norm, eps,
    rows, max_rows, tiles, h, memory, words, layer,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, UNIT: tl.constexpr,
    HEADS: tl.constexpr, RANK_ONE: tl.constexpr, RANK_FEW: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: rows, blocks of HEADS heads of q, of k and of v. Each row of a dense tile has one head."""
    leader = tl.program_id(0)
    block = tl.program_id(1)
    count = tl.load(rows + leader, eviction_policy=KEEP)
    tile = tl.load(rows + max_rows + leader, eviction_policy=KEEP)
    token = tl.load(rows + 2 * max_rows + leader, eviction_policy=KEEP)
    slot = tl.load(slots + leader)
    adapters = (tiles, h, memory, words, layer)
    if (count == _DENSE) & (token < HEADS):
        _tile(block, token, leader - token, tl.num_programs(0), tile, adapters, qkv, qkv_stride,
              positions, slots, table, pages, page_stride, bias, q_norm, k_norm, eps,
              NUM_HEADS, KV_HEADS, PAGE_SIZE, DIM, HALF, HAS_BIAS, HAS_NORM, UNIT, HEADS, 1, BLOCK_T,
              BLOCK_R, True, EXACT)  # fmt: skip
    elif count > 1:
        _heads(block, leader, count, tile, adapters, qkv, qkv_stride, positions, slots, table, pages,
               page_stride, bias, q_norm, k_norm, eps, NUM_HEADS, KV_HEADS, PAGE_SIZE, DIM, HALF, HAS_BIAS,
               HAS_NORM, UNIT, HEADS, _FEW_ROWS, RANK_FEW, PARTS)  # fmt: skip
    elif (count == 1) & (slot >= 0):
        _heads(block, leader, count, tile, adapters, qkv, qkv_stride, positions, slots, table, pages,
               page_stride, bias, q_norm, k_norm, eps, NUM_HEADS, KV_HEADS, PAGE_SIZE, DIM, HALF, HAS_BIAS,
               HAS_NORM, UNIT, HEADS, 1, RANK_ONE, PARTS)  # fmt: skip


@triton.jit
def _find_heads(block, NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEADS: tl.constexpr):
    """(module, its first head in the projection, the block's in the module, its number of heads)."""
    q_blocks: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    kv_blocks: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    is_q = block < q_blocks
    is_k = block < q_blocks + kv_blocks
    before = tl.where(is_q, 0, tl.where(is_k, q_blocks, q_blocks + kv_blocks))
    base = tl.where(is_q, 0, tl.where(is_k, NUM_HEADS, NUM_HEADS + KV_HEADS))
    module = tl.where(is_q, 0, tl.where(is_k, 1, 2))
    return module, base, (block - before) * HEADS, tl.where(is_q, NUM_HEADS, KV_HEADS)


@triton.jit
def _heads(
    block, leader, count, tile, adapters, qkv, qkv_stride, positions, slots, table, pages, page_stride,
    bias, q_norm, k_norm, eps,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, UNIT: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A block of heads of `count` rows from `leader` on: a tile's, or one without."""
    module, base, first_head, num_heads = _find_heads(block, NUM_HEADS, KV_HEADS, HEADS)
    # Each row's heads, one after the other.
    each = tl.arange(0, BLOCK_T * HEADS)[:, None]
    source = leader + each // HEADS
    slot = tl.load(slots + source, mask=each < count * HEADS, other=-1)
    position = tl.load(positions + source, mask=slot >= 0, other=0)
    # Heads and pairs of their elements, side by side.
    index = tl.arange(0, HEADS * HALF)
    head = first_head + index // HALF
    pair = index % HALF
    n = head * DIM + pair
    is_column = (head < num_heads) & (pair < DIM // 2)
    t = tl.arange(0, BLOCK_T)
    at = qkv + (leader + t).to(tl.int64)[:, None] * qkv_stride + base * DIM + n[None, :]
    mask = (t < count)[:, None] & is_column[None, :]
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + DIM // 2, mask=mask, other=0.0).to(tl.float32)
    if tile >= 0:
        kind = qkv.dtype.element_ty
        _, _, memory, _, _ = adapters
        start, value, rest = open_rows(tile, 0, t, count, module, adapters, BLOCK_R, PARTS)
        b_first = load_b(start, n, is_column, memory, UNIT)
        b_second = load_b(start, n + DIM // 2, is_column, memory, UNIT)
        first = add_rows(first, value, b_first, rest, n, is_column, UNIT, BLOCK_R)
        second = add_rows(second, value, b_second, rest, n + DIM // 2, is_column, UNIT, BLOCK_R)
        first, second = first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)
    head_column = first_head + each % HEADS
    inside = (head_column < num_heads) & (tl.arange(0, HALF)[None, :] < DIM // 2)
    finish_heads(tl.reshape(first, [BLOCK_T * HEADS, HALF]), tl.reshape(second, [BLOCK_T * HEADS, HALF]),
                 qkv + source.to(tl.int64) * qkv_stride, position, slot, base + head_column, inside,
                 inside & (slot >= 0), table, pages, page_stride, bias, q_norm, k_norm, eps,
                 NUM_HEADS, KV_HEADS, PAGE_SIZE, DIM, HALF, HAS_BIAS, HAS_NORM)  # fmt: skip


@triton.jit(do_not_specialize=["layer"])
def write_kv_tiles(
    qkv, qkv_stride, positions, slots, table, pages, page_stride, bias, q_norm, k_norm, eps,
    bounds, tiles, h, memory, words, layer,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, UNIT: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, IS_LONG: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of HEADS heads of q, of k and of v; wide tiles, or more than there are."""
    tile = tl.load(bounds + 2) + tl.program_id(1)
    if tile >= tl.load(bounds + 3):
        return
    record = tiles + tile * TILE_STRIDE
    first = tl.load(record + RECORD_FIRST)
    _tile(tl.program_id(0), 0, first, first + tl.load(record + RECORD_NUM_TOKENS), tile,
          (tiles, h, memory, words, layer), qkv, qkv_stride, positions,
          slots, table, pages, page_stride, bias, q_norm, k_norm, eps,
          NUM_HEADS, KV_HEADS, PAGE_SIZE, DIM, HALF, HAS_BIAS, HAS_NORM, UNIT, HEADS, HEADS, BLOCK_T,
          BLOCK_R, IS_LONG, EXACT)  # fmt: skip


@triton.jit
def _tile(
    block, skipped, first_row, num_rows, tile, adapters, qkv, qkv_stride, positions, slots, table,
    pages, page_stride, bias, q_norm, k_norm, eps,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, UNIT: tl.constexpr,
    HEADS: tl.constexpr, NUM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
    IS_LONG: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """NUM heads of a block of HEADS after those skipped, for a tile whose rows begin at first_row.

    num_rows: rows of the step, or those before the tile's end.
    """
    module, base, first_head, num_heads = _find_heads(block, NUM_HEADS, KV_HEADS, HEADS)
    tiles, _, memory, _, _ = adapters
    t = tl.arange(0, BLOCK_T)
    is_token = t < tl.load(tiles + tile * TILE_STRIDE + RECORD_NUM_TOKENS)
    at = first_row + t
    slot = tl.load(slots + at, mask=at < num_rows, other=-1)
    position = tl.load(positions + at, mask=at < num_rows, other=0)
    slot = tl.where(is_token, slot, -1)[:, None]
    position = tl.where(slot >= 0, position[:, None], 0)
    row = qkv + at.to(tl.int64)[:, None] * qkv_stride
    pair = tl.arange(0, HALF)
    kind = qkv.dtype.element_ty
    start, value, rest = open_tile(tile, t, is_token, module, adapters, BLOCK_R)
    for i in range(NUM):
        head = first_head + skipped + i
        inside = (pair < DIM // 2) & (head < num_heads)
        n = head * DIM + pair
        mask = (slot >= 0) & inside[None, :]
        first = tl.load(row + base * DIM + n[None, :], mask=mask, other=0.0)
        second = tl.load(row + base * DIM + DIM // 2 + n[None, :], mask=mask, other=0.0)
        b_first = load_b(start, n, inside, memory, UNIT)
        b_second = load_b(start, n + DIM // 2, inside, memory, UNIT)
        first = add_block(first.to(tl.float32), value, b_first, rest, n, inside,
                          UNIT, BLOCK_R, IS_LONG, EXACT)  # fmt: skip
        second = add_block(second.to(tl.float32), value, b_second, rest, n + DIM // 2, inside,
                           UNIT, BLOCK_R, IS_LONG, EXACT)  # fmt: skip
        first, second = first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)
        finish_heads(first, second, row, position, slot, base + head, inside[None, :], mask, table, pages,
                     page_stride, bias, q_norm, k_norm, eps,
                     NUM_HEADS, KV_HEADS, PAGE_SIZE, DIM, HALF, HAS_BIAS, HAS_NORM)  # fmt: skip
