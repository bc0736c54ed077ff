"""sample in plain torch, row by row in float64; the contract stands in the package's docstring."""

from __future__ import annotations

import torch


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits: [L, V]; the others [L]. Returns tokens and finite, [L] int32 each."""
    best, tokens = logits.float().max(dim=1)
    finite = best.isfinite()
    # Where several are best, max may return any of them.
    tokens = (logits.float() == best[:, None]).int().argmax(dim=1)
    for row in range(len(logits)):
        if temperature[row] > 0 and finite[row]:
            tokens[row] = _draw(
                logits[row].float() / temperature[row],
                int(top_k[row]),
                float(top_p[row]),
                float(min_p[row]),
                float(uniform[row]),
            )
    return tokens.int(), finite.int()


def _draw(scaled: torch.Tensor, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    """Token of one row, [V], of logits over temperature."""
    weights = (scaled.double() - scaled.max()).exp()
    order = torch.arange(len(scaled))
    if top_k or top_p < 1.0 or min_p > 0.0:
        order = scaled.argsort(descending=True, stable=True)[: top_k or None]
        weights = weights[order]
        before = weights.cumsum(dim=0) - weights
        keep = (before < top_p * weights.sum()) & (weights >= min_p)
        # Rounding must not take the best token away.
        keep[0] = True
        weights = weights * keep
    sums = weights.cumsum(dim=0)
    passed = (sums > uniform * sums[-1]) & (weights > 0)
    # A product rounded up to the total passes no running sum: take the last positive weight.
    column = passed.int().argmax() if passed.any() else weights.nonzero()[-1, 0]
    return int(order[column])
