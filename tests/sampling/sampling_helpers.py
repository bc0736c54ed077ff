"""Rows to sample from, and the sampler's semantics written naively, one row and one token at a time."""

from __future__ import annotations

import math
from typing import Any

import torch

from polybatch.request import Request, SamplingParams, Sequence
from polybatch.sampling.state import SamplingState


def make_state(
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    *,
    seed: int = 0,
    index: int = 0,
    stop_ids: frozenset[int] = frozenset(),
    **params: Any,
) -> SamplingState:
    request = Request("r", tuple(prompt or [1]), SamplingParams(**params), 100, seed, stop_ids)
    seq = Sequence(request, index)
    state = SamplingState(seq)
    seq.tokens += output or []
    return state


def naive_edit(row: list[float], state: SamplingState) -> list[float]:
    """Bias, stop mask and penalties, straight from their definitions."""
    row, p = list(row), state.params
    output = state.seq.output_token_ids
    for token, bias in p.logit_bias.items():
        row[token] += bias
    if len(output) < p.min_tokens:
        for token in state.seq.request.stop_token_ids:
            row[token] = -math.inf
    for token in set(state.seq.tokens):
        row[token] = (
            row[token] / p.repetition_penalty if row[token] > 0 else row[token] * p.repetition_penalty
        )
    for token in set(output):
        row[token] -= p.frequency_penalty * output.count(token) + p.presence_penalty
    return row


def naive_distribution(row: list[float], state: SamplingState) -> dict[int, float]:
    """Probability of each token that may be drawn."""
    p = state.params
    row = naive_edit(row, state)
    if p.temperature == 0:
        return {max(range(len(row)), key=lambda t: row[t]): 1.0}
    order = sorted(range(len(row)), key=lambda t: (-row[t], t))
    if p.top_k:
        order = order[: p.top_k]
    weights = {t: math.exp((row[t] - row[order[0]]) / p.temperature) for t in order}
    total, before, kept = sum(weights.values()), 0.0, {}
    for token in order:
        if before < p.top_p * total and weights[token] >= p.min_p:
            kept[token] = weights[token]
        before += weights[token]
    return {t: w / sum(kept.values()) for t, w in kept.items() if w > 0}


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale
