"""Log-probabilities of chosen tokens and of the best alternatives, from the model's raw logits.

They are the model's own: before temperature, penalties, bias and truncation (vLLM's default too).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from polybatch.sampling.rows import log_normalizer, top_candidates

MAX_ROWS = 128
"""Rows worked on at once: each takes a few copies of itself in memory."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One position: the token that stands there, its log-probability and rank, and the best few.

    rank: 1 + number of tokens that are strictly more probable.
    """

    token: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


def gather_logprobs(logits: Tensor, tokens: SequenceOf[int], num_top: SequenceOf[int]) -> list[TokenLogprobs]:
    """Log-probabilities of one token per row and of its num_top best.

    logits: [L, V] float32, raw. tokens, num_top: one per row.
    """
    if len(tokens) > MAX_ROWS:
        rest = gather_logprobs(logits[MAX_ROWS:], tokens[MAX_ROWS:], num_top[MAX_ROWS:])
        return gather_logprobs(logits[:MAX_ROWS], tokens[:MAX_ROWS], num_top[:MAX_ROWS]) + rest
    normalizer = log_normalizer(logits)
    own = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = ((logits > own).sum(dim=1) + 1).tolist()
    logprobs = (own[:, 0] - normalizer).tolist()
    most = min(max(num_top, default=0), logits.shape[1])
    top_ids: list[list[int]] = [[] for _ in tokens]
    top_logprobs: list[list[float]] = [[] for _ in tokens]
    if most:
        values, ids = top_candidates(logits, most)
        top_ids = ids.tolist()
        top_logprobs = (values - normalizer[:, None]).tolist()
    return [
        TokenLogprobs(token, logprobs[i], ranks[i], tuple(top_ids[i][:n]), tuple(top_logprobs[i][:n]))
        for i, (token, n) in enumerate(zip(tokens, num_top, strict=True))
    ]
