"""rms_norm for CUDA, with the residual's addition before it.

One program is one row and keeps it in registers: each input is read once, the sum's order depends on the
row's width alone. The residual stream has the activations' dtype and the sum is rounded to it before the
norm reads it, as in transformers: residual = round(residual + x), out = round(round(normal) * weight).
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polybatch.errors import EngineError

MAX_WIDTH = 1 << 14


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise rows of x, or of residual + x, which then becomes the residual; returns out.

    x: [T, N], rows may be strided; weight: [N]
    residual: [T, N], changed in place, or None
    rows: [L] int32, rows to normalise, -1 for none; out[i] is that of rows[i], and the residual stays as
        it was. None: all rows
    out: [T, N] or [L, N], rows may be strided; may be x where rows is None. None: allocated
    Reads and writes x (and the residual) once. Raises EngineError for rows wider than 16,384.
    """
    width = checked_width(x)
    num_rows = len(x) if rows is None else len(rows)
    if out is None:
        out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    if num_rows:
        block = triton.next_power_of_2(width)
        _rms_norm[(num_rows,)](
            x, x.stride(0), residual, 0 if residual is None else residual.stride(0), rows, weight,
            out, out.stride(0), eps,
            WIDTH=width, BLOCK=block, HAS_RESIDUAL=residual is not None, HAS_ROWS=rows is not None,
            num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
    return out


def checked_width(x: torch.Tensor) -> int:
    """Elements of a row of x. Raises EngineError if they do not fit in registers."""
    width = x.shape[1]
    if width > MAX_WIDTH:
        raise EngineError(f"rms_norm got rows of {width} elements; at most {MAX_WIDTH} fit in registers")
    return width


@triton.jit
def _rms_norm(
    x, x_stride, residual, residual_stride, rows, weight, out, out_stride, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_ROWS: tl.constexpr,
):  # fmt: skip
    target = tl.program_id(0).to(tl.int64)
    source = target
    if HAS_ROWS:
        source = tl.load(rows + target).to(tl.int64)
        if source < 0:
            return
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    kind = out.dtype.element_ty
    row = tl.load(x + source * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        stream = residual + source * residual_stride + column
        row = (row + tl.load(stream, mask=mask, other=0.0).to(tl.float32)).to(kind)
        if not HAS_ROWS:
            tl.store(stream, row, mask=mask)
        row = row.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(row * row, axis=0) / WIDTH + eps)
    normal = (row * inverse).to(kind).to(tl.float32)
    tl.store(out + target * out_stride + column, (normal * scale).to(kind), mask=mask)
