"""write_kv in plain torch; the contract stands in the package's docstring."""

from __future__ import annotations

import torch

from polybatch.errors import EngineError
from polybatch.kernels.norm.reference import rms_norm


def write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    inv_freq: torch.Tensor,
    rope_scaling: float,
    kv_pages: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Rotate q and k, scatter k and v into their slots, return q; shapes as in the package's docstring."""
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise EngineError(
            f"write_kv got q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}; they must be "
            "[T, H, D], [T, KH, D] and [T, KH, D]"
        )
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps)
    angles = positions.float()[:, None] * inv_freq
    cos, sin = angles.cos() * rope_scaling, angles.sin() * rope_scaling

    page_size = kv_pages.shape[3]
    pages, offsets = slots // page_size, slots % page_size
    kv_pages[pages, 0, :, offsets] = rotate(k, cos, sin).to(kv_pages.dtype)
    kv_pages[pages, 1, :, offsets] = v.to(kv_pages.dtype)
    return rotate(q, cos, sin)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + D / 2]) of x: [T, heads, D] by its angle; cos, sin: [T, D / 2]."""
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)
