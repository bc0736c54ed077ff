"""embedding for CUDA: a gather of rows whose ids come from the host or from the last step's samples."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
"""Columns per program: a 16-byte load per thread at 16 bits."""


def embedding(
    token_ids: torch.Tensor,
    source: torch.Tensor,
    sampled: torch.Tensor,
    table: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Shapes as in the package's docstring; out: [T, N], contiguous, dtype of the table; None: allocated."""
    num_rows, width = len(token_ids), table.shape[1]
    if out is None:
        out = torch.empty(num_rows, width, dtype=table.dtype, device=table.device)
    if num_rows:
        _embedding[(num_rows, triton.cdiv(width, BLOCK))](
            token_ids, source, sampled, table, out, WIDTH=width, BLOCK=BLOCK, num_warps=4
        )
    return out


@triton.jit
def _embedding(token_ids, source, sampled, table, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    late = tl.load(source + row)
    token = tl.load(token_ids + row, mask=late < 0, other=0) + tl.load(
        sampled + late, mask=late >= 0, other=0
    )
    values = tl.load(table + token.to(tl.int64) * WIDTH + column, mask=mask, other=0.0)
    tl.store(out + row * WIDTH + column, values, mask=mask)
