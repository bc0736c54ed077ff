"""write_kv for CUDA: bias, head norms, rotation and the scatter into pages in one launch per layer.

It reads the fused projection [T, (H + 2 KH) * D] where it lies, writes rotated queries back in place, and
keys and values into their pages. One program is one token and a few heads, so each number of a token is the
same in any batch. Rounding follows the contract: the biased value, the normalised one and its product with
the weight are rounded to the activations' dtype, the rotation is float32.

Sines and cosines come from a float32 table made on the host. In the kernel, an angle of 131,072 radians
would need the slow range reduction of sin and cos, and must be the rounded float32 product that the
checkpoints were trained with; the table costs max_model_len * D * 4 bytes (67 MB at 131,072 and D = 128) and
512 bytes of cached reads per token and program beside 4 KiB of keys, values or queries.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polybatch.errors import EngineError

HEADS = 16
"""Heads of q, k and v per program."""


def rope_table(inv_freq: torch.Tensor, rope_scaling: float, max_positions: int) -> torch.Tensor:
    """Cosines and then sines of every position, [max_positions, D] float32, times the scaling.

    inv_freq: [D / 2] float32, radians per position. The angle is rounded as in the reference. Made on the
    host, 16k positions at a time, and to be moved to the device.
    """
    inv_freq = inv_freq.cpu()
    table = torch.empty(max_positions, 2 * len(inv_freq))
    for start in range(0, max_positions, 1 << 14):
        rows = table[start : start + (1 << 14)]
        angles = torch.arange(start, start + len(rows), dtype=torch.float32)[:, None] * inv_freq
        rows[:, : len(inv_freq)] = angles.cos() * rope_scaling
        rows[:, len(inv_freq) :] = angles.sin() * rope_scaling
    return table


def write_kv(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    table: torch.Tensor,
    kv_pages: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Rotate q in place and scatter k and v; returns q, [T, H, D], a view of qkv.

    qkv: [T, (H + 2 KH) * D], rows may be strided; k's and v's columns are left as they are
    positions, slots: [T] int32; a row with slot -1 is padding: nothing of it is read or written
    table: `rope_table`, positions < len(table)
    kv_pages: [num_pages, 2, KH, page_size, D], pages may be strided; k and v are rounded to its dtype
    bias: [(H + 2 KH) * D], added first, or None. q_norm, k_norm: [D], both or neither.
    Raises EngineError where shapes disagree.
    """
    shape = head_shape(qkv, table, kv_pages)
    num_rows = shape["NUM_HEADS"] + 2 * shape["KV_HEADS"]
    grid = (qkv.shape[0], triton.cdiv(num_rows, HEADS))
    if qkv.shape[0]:
        _write_kv[grid](
            qkv, qkv.stride(0), positions, slots, table, kv_pages, kv_pages.stride(0),
            bias, q_norm, k_norm, eps, **shape, HAS_BIAS=bias is not None, HAS_NORM=q_norm is not None,
            HEADS=HEADS, num_warps=4,
        )  # fmt: skip
    return queries_of(qkv, shape)


def head_shape(qkv: torch.Tensor, table: torch.Tensor, kv_pages: torch.Tensor) -> dict[str, int]:
    """What the kernels know of heads when they are compiled. Raises EngineError where shapes disagree."""
    kv_heads, page_size, dim = kv_pages.shape[2:]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    if heads < 1 or qkv.shape[1] != (heads + 2 * kv_heads) * dim or table.shape[1] != dim:
        raise EngineError(
            f"write_kv got qkv {tuple(qkv.shape)}, a rotary table {tuple(table.shape)} and pages "
            f"{tuple(kv_pages.shape)}; they must be [T, (H + 2 KH) * D], [positions, D] and "
            "[num_pages, 2, KH, page_size, D]"
        )
    return {
        "NUM_HEADS": heads, "KV_HEADS": kv_heads, "PAGE_SIZE": page_size, "DIM": dim,
        "HALF": triton.next_power_of_2(dim // 2),
    }  # fmt: skip


def queries_of(qkv: torch.Tensor, shape: dict[str, int]) -> torch.Tensor:
    """[T, H, D], a view of qkv."""
    heads: torch.Tensor = qkv.unflatten(1, (-1, shape["DIM"]))
    return heads[:, : shape["NUM_HEADS"]]


@triton.jit
def _write_kv(
    qkv, qkv_stride, positions, slots, table, pages, page_stride, bias, q_norm, k_norm, eps,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    inside = pair < DIM // 2
    mask = (head < NUM_HEADS + 2 * KV_HEADS) & inside
    row = qkv + token.to(tl.int64) * qkv_stride
    first = tl.load(row + head * DIM + pair, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(row + head * DIM + pair + DIM // 2, mask=mask, other=0.0).to(tl.float32)
    finish_heads(first, second, row, tl.load(positions + token), slot, head, mask, mask, table, pages,
                 page_stride, bias, q_norm, k_norm, eps,
                 NUM_HEADS, KV_HEADS, PAGE_SIZE, DIM, HALF, HAS_BIAS, HAS_NORM)  # fmt: skip


@triton.jit
def finish_heads(
    first, second, row, position, slot, head, is_column, mask, table, pages, page_stride,
    bias, q_norm, k_norm, eps,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Bias, norm, rotation and the stores of both halves of heads, [X, HALF] float32 each.

    Either X are heads of one token, head [X, 1] and row, position and slot its own, or X are tokens, and it
    is the other way round. is_column: [X or 1, HALF], columns that exist. mask: [X, HALF], what to store.
    """
    pair = tl.arange(0, HALF)[None, :]
    inside = pair < DIM // 2
    is_q = head < NUM_HEADS
    is_v = head >= NUM_HEADS + KV_HEADS
    at = head * DIM + pair
    kind = row.dtype.element_ty
    if HAS_BIAS:
        first += tl.load(bias + at, mask=is_column, other=0.0).to(tl.float32)
        second += tl.load(bias + at + DIM // 2, mask=is_column, other=0.0).to(tl.float32)
        first, second = first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)
    if HAS_NORM:
        inverse = tl.rsqrt(tl.sum(first * first + second * second, axis=1, keep_dims=True) / DIM + eps)
        of_q, of_k = inside & is_q, inside & ~is_q & ~is_v
        weight_1 = tl.load(q_norm + pair, mask=of_q, other=0.0).to(tl.float32)
        weight_1 += tl.load(k_norm + pair, mask=of_k, other=0.0).to(tl.float32)
        weight_2 = tl.load(q_norm + pair + DIM // 2, mask=of_q, other=0.0).to(tl.float32)
        weight_2 += tl.load(k_norm + pair + DIM // 2, mask=of_k, other=0.0).to(tl.float32)
        normal_1, normal_2 = (first * inverse).to(kind), (second * inverse).to(kind)
        first = tl.where(is_v, first, (normal_1.to(tl.float32) * weight_1).to(kind).to(tl.float32))
        second = tl.where(is_v, second, (normal_2.to(tl.float32) * weight_2).to(kind).to(tl.float32))

    angle = table + position.to(tl.int64) * DIM + pair
    cos = tl.load(angle, mask=inside, other=0.0)
    sin = tl.load(angle + DIM // 2, mask=inside, other=0.0)
    turned_1 = tl.where(is_v, first, first * cos - second * sin).to(kind)
    turned_2 = tl.where(is_v, second, second * cos + first * sin).to(kind)

    tl.store(row + at, turned_1, mask=mask & is_q)
    tl.store(row + at + DIM // 2, turned_2, mask=mask & is_q)
    # Heads after the queries follow one another in a page as in the projection: keys, then values.
    page = pages + (slot // PAGE_SIZE).to(tl.int64) * page_stride + (slot % PAGE_SIZE) * DIM
    target = page + (head - NUM_HEADS) * (PAGE_SIZE * DIM) + pair
    stored = pages.dtype.element_ty
    tl.store(target, turned_1.to(stored), mask=mask & ~is_q)
    tl.store(target + DIM // 2, turned_2.to(stored), mask=mask & ~is_q)
