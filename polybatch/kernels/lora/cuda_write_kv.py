"""write_kv over y + B h for CUDA: q, k and v get their adapters on the way to rotation and pages.

A program of decode steps and short chunks is some heads of one module, for one to LEAD_ROWS rows one after
the other, which find B in the multiprocessor's own cache. Long chunks are tiles of tokens of one head.
y + B h is rounded to the dtype; what follows is `write_kv.cuda`'s.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from polybatch.kernels.lora.cuda_delta import (
    RECORD_FIRST,
    RECORD_NUM_TOKENS,
    TILE_STRIDE,
    add_rows,
    add_tile,
)
from polybatch.kernels.write_kv.cuda import finish_heads


@triton.jit(
    do_not_specialize=["layer", "max_rows"], do_not_specialize_on_alignment=["rows", "positions", "slots"]
)
def write_kv_rows(
    qkv, qkv_stride, positions, slots, table, pages, page_stride, bias, q_norm, k_norm, eps,
    rows, max_rows, tiles, h, memory, words, layer,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, HEADS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid: rows, blocks of HEADS heads of q, of k and of v."""
    leader = tl.program_id(0)
    count = tl.load(rows + leader)
    tile = tl.load(rows + max_rows + leader)
    token = tl.load(rows + 2 * max_rows + leader)
    for i in range(count):
        slot = tl.load(slots + leader + i)
        if slot >= 0:
            _heads(qkv + (leader + i).to(tl.int64) * qkv_stride, tl.load(positions + leader + i), slot,
                   tile, token + i, table, pages, page_stride, bias, q_norm, k_norm, eps,
                   tiles, h, memory, words, layer,
                   NUM_HEADS, KV_HEADS, PAGE_SIZE, DIM, HALF, HEADS, HAS_BIAS, HAS_NORM, UNIT,
                   BLOCK_R)  # fmt: skip


@triton.jit
def _heads(
    row, position, slot, tile, token, table, pages, page_stride, bias, q_norm, k_norm, eps,
    tiles, h, memory, words, layer,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, HEADS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Heads of one token, found from the program's block of heads."""
    q_blocks: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    kv_blocks: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    block = tl.program_id(1)
    is_q = block < q_blocks
    is_k = block < q_blocks + kv_blocks
    before = tl.where(is_q, 0, tl.where(is_k, q_blocks, q_blocks + kv_blocks))
    base = tl.where(is_q, 0, tl.where(is_k, NUM_HEADS, NUM_HEADS + KV_HEADS))
    num_heads = tl.where(is_q, NUM_HEADS, KV_HEADS)
    # Heads and pairs of their elements, side by side.
    index = tl.arange(0, HEADS * HALF)
    head = (block - before) * HEADS + index // HALF
    pair = index % HALF
    n = head * DIM + pair
    is_column = (head < num_heads) & (pair < DIM // 2)
    first = tl.load(row + base * DIM + n, mask=is_column, other=0.0).to(tl.float32)[None, :]
    second = tl.load(row + base * DIM + n + DIM // 2, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if tile >= 0:
        kind = row.dtype.element_ty
        record = tiles + tile * TILE_STRIDE
        module = tl.where(is_q, 0, tl.where(is_k, 1, 2))
        first = add_rows(first, token, 1, record, n, is_column, h, memory, words, layer,
                         module, UNIT, 1, BLOCK_R, HEADS * HALF)  # fmt: skip
        second = add_rows(second, token, 1, record, n + DIM // 2, is_column, h, memory, words, layer,
                          module, UNIT, 1, BLOCK_R, HEADS * HALF)  # fmt: skip
        first, second = first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)
    head_column = (block - before) * HEADS + tl.arange(0, HEADS)[:, None]
    mask = (head_column < num_heads) & (tl.arange(0, HALF)[None, :] < DIM // 2)
    finish_heads(tl.reshape(first, [HEADS, HALF]), tl.reshape(second, [HEADS, HALF]), row, position, slot,
                 base + head_column, mask, mask, table, pages, page_stride, bias, q_norm, k_norm, eps,
                 NUM_HEADS, KV_HEADS, PAGE_SIZE, DIM, HALF, HAS_BIAS, HAS_NORM)  # fmt: skip


@triton.jit(do_not_specialize=["layer"])
def write_kv_tiles(
    qkv, qkv_stride, positions, slots, table, pages, page_stride, bias, q_norm, k_norm, eps,
    bounds, tiles, h, memory, words, layer,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: heads of q, k and v, wide tiles."""
    head = tl.program_id(0)
    record = tiles + (tl.load(bounds + 2) + tl.program_id(1)) * TILE_STRIDE
    t = tl.arange(0, BLOCK_T)
    is_token = t < tl.load(record + RECORD_NUM_TOKENS)
    at = tl.load(record + RECORD_FIRST) + t
    slot = tl.load(slots + at, mask=is_token, other=-1)
    position = tl.load(positions + at, mask=slot >= 0, other=0)[:, None]
    slot = slot[:, None]
    is_k = head >= NUM_HEADS
    is_v = head >= NUM_HEADS + KV_HEADS
    module = is_k.to(tl.int32) + is_v.to(tl.int32)
    base = tl.where(is_v, NUM_HEADS + KV_HEADS, tl.where(is_k, NUM_HEADS, 0))
    pair = tl.arange(0, HALF)
    inside = pair < DIM // 2
    n = (head - base) * DIM + pair
    row = qkv + at.to(tl.int64)[:, None] * qkv_stride
    mask = (slot >= 0) & inside[None, :]
    kind = qkv.dtype.element_ty
    first = tl.load(row + head * DIM + pair[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(row + head * DIM + DIM // 2 + pair[None, :], mask=mask, other=0.0).to(tl.float32)
    first = add_tile(first, t, is_token, record, n, inside, h, memory, words, layer,
                     module, UNIT, BLOCK_R, EXACT)  # fmt: skip
    second = add_tile(second, t, is_token, record, n + DIM // 2, inside, h, memory, words, layer,
                      module, UNIT, BLOCK_R, EXACT)  # fmt: skip
    first, second = first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)
    finish_heads(first, second, row, position, slot, head, inside[None, :], mask, table, pages, page_stride,
                 bias, q_norm, k_norm, eps,
                 NUM_HEADS, KV_HEADS, PAGE_SIZE, DIM, HALF, HAS_BIAS, HAS_NORM)  # fmt: skip
