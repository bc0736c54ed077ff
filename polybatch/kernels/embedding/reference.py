"""embedding in plain torch; the contract stands in the package's docstring."""

from __future__ import annotations

import torch


def embedding(
    token_ids: torch.Tensor, source: torch.Tensor, sampled: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """token_ids, source: [T]; sampled: [any]; table: [V, N]. Returns [T, N]."""
    ids = token_ids.long()
    late = source >= 0
    ids[late] = sampled[source[late].long()].long()
    return table[ids]
