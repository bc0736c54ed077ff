"""sample for CUDA: three launches, the last one only where rows may be truncated.

1. `_measure_spans`: every SM reads its share of the logits once and keeps, per span of 128 columns, the best
   logit and, where the row draws, the sum of exp((x - best of the span) / temperature).
2. `_finish`: a program per row finds the span that holds the row's best logit, or where the running sum over
   spans passes the row's random number, and reads that span's 128 columns again.
3. `_truncate` (see `cuda_truncate`): rows with top-k, top-p or min-p.

All sums have an order fixed by the vocabulary's size; there are no atomics. No launch allocates or waits, and
the workspace is made once, so all of it can be captured in a CUDA graph.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from polybatch.errors import EngineError
from polybatch.kernels.sample.cuda_truncate import CANDIDATES, truncate

SPAN = 128
"""Columns whose best is kept: 512 bytes, one load of a warp at 32 bits."""

SPANS = 32
"""Spans per program of the first launch."""

MAX_SPANS = 4096
"""Spans that one program of the second launch holds in registers: a vocabulary of 524,288."""


@dataclass(frozen=True, slots=True)
class SampleParams:
    """Each row's parameters on the device; [L] each, as in the package's docstring."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    uniform: torch.Tensor


class DeviceSampler:
    """The launches and their workspace: 16 bytes per span and 32 KiB per row.

    max_rows, vocab_size: largest logits. Raises EngineError for a vocabulary above 524,288.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device | str) -> None:
        num_spans = -(-vocab_size // SPAN)
        if num_spans > MAX_SPANS:
            raise EngineError(
                f"vocab_size is {vocab_size}; the device samples from at most {MAX_SPANS * SPAN}"
            )
        self.max_rows = max_rows
        self.vocab_size = vocab_size

        def empty(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(max_rows, width, dtype=dtype, device=device)

        self._best = empty(num_spans, torch.float32)
        self._sums = empty(num_spans, torch.float32)
        self._spans = empty(num_spans, torch.int32)
        self._values = empty(CANDIDATES, torch.float32)
        self._ids = empty(CANDIDATES, torch.int32)

    def sample(
        self,
        logits: torch.Tensor,
        params: SampleParams,
        tokens: torch.Tensor,
        finite: torch.Tensor,
        *,
        may_truncate: bool = True,
    ) -> None:
        """Choose every row's token; see the package's docstring.

        logits: [L, V], rows may be strided. params, tokens, finite: at least L long.
        may_truncate: False saves a launch and takes every drawn row as not truncated.
        Raises EngineError where logits disagree with the sampler's size.
        """
        rows, vocab = logits.shape
        if rows > self.max_rows or vocab != self.vocab_size:
            raise EngineError(
                f"sample got logits {tuple(logits.shape)}; the sampler was made for "
                f"[{self.max_rows}, {self.vocab_size}]"
            )
        if not rows:
            return
        num_spans = self._best.shape[1]
        stride = logits.stride(0)
        _measure_spans[(rows, triton.cdiv(num_spans, SPANS))](
            logits, stride, vocab, num_spans, params.temperature, self._best, self._sums,
            SPANS=SPANS, SPAN=SPAN, num_warps=4,
        )  # fmt: skip
        block = triton.next_power_of_2(num_spans)
        _finish[(rows,)](
            logits, stride, vocab, num_spans, self._best, self._sums,
            params.temperature, params.uniform, tokens, finite,
            BLOCK=block, SPAN=SPAN, num_warps=4,
        )  # fmt: skip
        if may_truncate:
            truncate(
                logits, self._best, self._sums, self._spans, self._values, self._ids,
                params.temperature, params.top_k, params.top_p, params.min_p, params.uniform, tokens, finite,
                span=SPAN,
            )  # fmt: skip


@triton.jit
def larger(a, b):
    """Maximum that a NaN wins."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _measure_spans(
    logits, stride, vocab, num_spans, temperature, best, sums, SPANS: tl.constexpr, SPAN: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    span = tl.program_id(1) * SPANS + tl.arange(0, SPANS)
    column = span[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    x = tl.load(logits + row * stride + column, mask=column < vocab, other=-float("inf")).to(tl.float32)
    most = tl.reduce(x, 1, larger)
    tl.store(best + row * num_spans + span, most, mask=span < num_spans)
    heat = tl.load(temperature + row)
    if heat > 0:
        # A span of -inf alone has no best to subtract; its sum is 0.
        base = tl.where(most > -float("inf"), tl.div_rn(most, heat), 0.0)
        weights = tl.exp(tl.div_rn(x, heat) - base[:, None])
        tl.store(sums + row * num_spans + span, tl.sum(weights, axis=1), mask=span < num_spans)


@triton.jit
def _finish(
    logits, stride, vocab, num_spans, best, sums, temperature, uniform, tokens, finite,
    BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    span = tl.arange(0, BLOCK)
    mask = span < num_spans
    most = tl.load(best + row * num_spans + span, mask=mask, other=-float("inf"))
    top = tl.reduce(most, 0, larger)
    is_finite = top - top == 0
    tl.store(finite + row, is_finite.to(tl.int32))

    heat = tl.load(temperature + row)
    # Where NaN is best no span equals it, so bound the choice.
    chosen = tl.minimum(tl.min(tl.where(most == top, span, BLOCK)), num_spans - 1)
    number = tl.load(uniform + row)
    rest = number * 0.0
    is_drawn = (heat > 0) & is_finite
    if is_drawn:
        scaled = tl.div_rn(most, heat) - tl.div_rn(top, heat)
        mass = tl.load(sums + row * num_spans + span, mask=mask, other=0.0) * tl.exp(scaled)
        mass = mass.to(tl.float64)
        running = tl.cumsum(mass, 0)
        total = tl.max(running)
        # A product rounded up to the total would pass no running sum.
        target = tl.minimum(number * total, total * (1.0 - 2.0**-52))
        chosen = tl.minimum(tl.min(tl.where((running > target) & (mass > 0), span, BLOCK)), num_spans - 1)
        own = tl.sum(tl.where(span == chosen, mass, 0.0))
        before = tl.sum(tl.where(span == chosen, running, 0.0)) - own
        # What the spans left over of the number is uniform within the span.
        rest = tl.maximum((target - before) / own, 0.0)

    column = chosen * SPAN + tl.arange(0, SPAN)
    x = tl.load(logits + row * stride + column, mask=column < vocab, other=-float("inf")).to(tl.float32)
    token = tl.min(tl.where(x == top, column, vocab))
    if is_drawn:
        weights = tl.exp(tl.div_rn(x, heat) - tl.div_rn(tl.max(x), heat)).to(tl.float64)
        running = tl.cumsum(weights, 0)
        total = tl.max(running)
        target = tl.minimum(rest * total, total * (1.0 - 2.0**-52))
        token = tl.min(tl.where((running > target) & (weights > 0), column, vocab))
    tl.store(tokens + row, tl.minimum(token, vocab - 1))
