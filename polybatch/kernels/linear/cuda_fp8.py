"""fp8 linear: activations rounded to e4m3 per token, then torch's scaled matrix product.

The rounding is one Triton launch, a program per token that reads its row once. Weights carry a scale
per output channel, so y = (xq wq^T) * x_scale[:, None] * w_scale[None, :], which the library applies as it
stores.

int8 is left out on purpose: `torch._int_mm` returns int32 and needs more than 16 tokens, so every decode step
would pay padding and a second pass over the output, where fp8 has neither and the same bytes.
"""

# Triton compiles these functions from their source; its own types are not Python's.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)


@triton.jit
def quantize_tokens_kernel(
    x_ptr,  # [T, num_in], rows x_stride apart
    values_ptr,  # [T, num_in] float8 e4m3, contiguous
    scales_ptr,  # [T] float32
    num_in,
    x_stride,
    BLOCK: tl.constexpr,
):
    """Round one token: scale = max|x| / 448, values = x / scale; a row of zeros has scale 1."""
    token = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < num_in
    x = tl.load(x_ptr + token * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(x), axis=0) / FP8_MAX
    scale = tl.where(scale > 1e-30, scale, 1.0)
    values = tl.minimum(tl.maximum(x / scale, -FP8_MAX), FP8_MAX)
    tl.store(values_ptr + token * num_in + column, values.to(values_ptr.dtype.element_ty), mask=mask)
    tl.store(scales_ptr + token, scale)
