"""lora in plain torch, one segment after the other; the contract stands in the package's docstring."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """Where the rows of N adapters lie for one linear layer, and the dense vectors they bring.

    row_bounds: [N + 1] int64; adapter n owns rows row_bounds[n] to row_bounds[n + 1]; equal bounds are
        rank 0.
    a_rows, b_rows: [row_bounds[N]] int64, first element in `memory` of each row; `in` elements follow
        from a_rows, `out` elements from b_rows.
    gain, bias: [N, out] float32, 1 and 0 where an adapter has none; None where no adapter has one.
    """

    row_bounds: torch.Tensor
    a_rows: torch.Tensor
    b_rows: torch.Tensor
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def lora(
    x: torch.Tensor, y: torch.Tensor, memory: torch.Tensor, segments: torch.Tensor, table: AdapterTable
) -> None:
    """Add each token's adapter to y in place; shapes as in the package's docstring."""
    bounds = table.row_bounds.tolist()
    for start, stop, adapter in segments.tolist():
        rows = slice(bounds[adapter], bounds[adapter + 1])
        a = _gather(memory, table.a_rows[rows], x.shape[1])
        b = _gather(memory, table.b_rows[rows], y.shape[1])
        result = y[start:stop].float() + x[start:stop].float() @ a.T @ b
        if table.gain is not None:
            result *= table.gain[adapter]
        if table.bias is not None:
            result += table.bias[adapter]
        y[start:stop] = result.to(y.dtype)


def _gather(memory: torch.Tensor, starts: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of `width` elements from each start: [rank, width] float32."""
    return memory[starts[:, None] + torch.arange(width, device=memory.device)].float()
