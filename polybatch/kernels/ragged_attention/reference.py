"""ragged_attention in plain torch, one sequence after the other; the contract is the package's."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def ragged_attention(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    page_table: torch.Tensor,
    cu_tokens: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    context_range: torch.Tensor | None = None,
    accumulate: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend every chunk to its sequence's keys; shapes as in the package's docstring.

    accumulate: dtype of the arithmetic and of both results, float32 or float64.
    """
    out = torch.zeros(q.shape, dtype=accumulate, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=accumulate, device=q.device)
    bounds = cu_tokens.tolist()
    for s, kv_len in enumerate(kv_lens.tolist()):
        rows = slice(bounds[s], bounds[s + 1])
        num_new = rows.stop - rows.start
        first_position = kv_len - num_new
        # No row of the chunk sees a key outside [low, high), so what lies there is not even read.
        low = 0 if window is None else max(0, first_position - window + 1)
        high = kv_len
        if context_range is not None:
            low = max(low, int(context_range[s, 0]))
            high = min(high, int(context_range[s, 1]))
        if num_new == 0 or low >= high:
            continue
        keys, values = _gather(kv_pages, page_table[s], low, high)
        query_positions = torch.arange(first_position, kv_len, device=q.device)
        key_positions = torch.arange(low, high, device=q.device)
        visible = _visible(query_positions, key_positions, window)
        out[rows], lse[rows] = _attend(
            q[rows].to(accumulate), keys.to(accumulate), values.to(accumulate), visible, scale
        )
    return out, lse


def merge_states(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join partial attention results over disjoint key ranges.

    outs: each [T, H, D]; lses: each [T, H]. Returns (out, lse) of the union of the ranges.
    Rows that saw nothing in a part (lse = -inf) take nothing from it.
    """
    parts = torch.stack(list(lses))
    lse = torch.logsumexp(parts, dim=0)
    seen = torch.isfinite(lse)
    weights = torch.exp(parts - torch.where(seen, lse, 0.0))
    return (torch.stack(list(outs)) * weights.unsqueeze(-1)).sum(dim=0), lse


def _gather(
    kv_pages: torch.Tensor, page_row: torch.Tensor, low: int, high: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values at positions [low, high) of one sequence, each [KH, high - low, D]."""
    page_size = kv_pages.shape[3]
    first_page = low // page_size
    pages = page_row[first_page : -(-high // page_size)].long()
    held = kv_pages[pages].permute(1, 2, 0, 3, 4).flatten(2, 3)
    offset = first_page * page_size
    keys, values = held[:, :, low - offset : high - offset]
    return keys, values


def _visible(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """Boolean [n, m]: causal, and within the window where there is one."""
    distance = queries[:, None] - keys[None, :]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q: [n, H, D]; keys, values: [KH, m, D]; visible: [n, m]. Returns [n, H, D] and [n, H]."""
    num_new, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[0]
    grouped = q.reshape(num_new, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.einsum("nkgd,kmd->nkgm", grouped, keys) * scale
    scores = scores.masked_fill(~visible[:, None, None, :], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    seen = torch.isfinite(lse)
    weights = torch.exp(scores - torch.where(seen, lse, 0.0).unsqueeze(-1))
    out = torch.einsum("nkgm,kmd->nkgd", weights, values)
    return out.flatten(1, 2), lse.flatten(1, 2)
