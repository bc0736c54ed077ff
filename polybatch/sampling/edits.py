"""Changes to single logits before sampling: bias, stop mask, penalties.

Order as in vLLM: bias, then the mask of min_tokens, then the repetition penalty (Keskar et al. 2019),
then frequency and presence penalties as OpenAI defines them. All rows of a batch are edited by a few
scattered writes; a row's result depends on that row alone.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from polybatch.sampling.state import SamplingState


def edit_logits(logits: Tensor, states: SequenceOf[SamplingState]) -> None:
    """Apply every row's bias, stop mask and penalties in place.

    logits: [L, V] float32, contiguous, one row per state.
    """
    flat = logits.view(-1)
    vocab = logits.shape[1]
    _add_bias(flat, vocab, states)
    masked = [row * vocab + token for row, state in enumerate(states) for token in state.masked_ids]
    if masked:
        flat[torch.tensor(masked, device=flat.device)] = -torch.inf
    _add_penalties(flat, vocab, states)


def _add_bias(flat: Tensor, vocab: int, states: SequenceOf[SamplingState]) -> None:
    pairs = [
        (row * vocab + token, bias)
        for row, state in enumerate(states)
        for token, bias in state.params.logit_bias.items()
    ]
    if pairs:
        index = torch.tensor([p[0] for p in pairs], device=flat.device)
        flat[index] += torch.tensor([p[1] for p in pairs], dtype=flat.dtype, device=flat.device)


def _add_penalties(flat: Tensor, vocab: int, states: SequenceOf[SamplingState]) -> None:
    rows = [(row, state) for row, state in enumerate(states) if state.has_penalty]
    if not rows:
        return
    counts = [state.count_new_tokens() for _, state in rows]
    lengths = [len(c.ids) for c in counts]
    index = torch.from_numpy(
        np.concatenate([c.ids + r * vocab for c, (r, _) in zip(counts, rows, strict=True)])
    )
    outputs = torch.from_numpy(np.concatenate([c.outputs for c in counts])).to(flat.device)
    index = index.to(flat.device)

    def spread(values: list[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), lengths)).to(flat.device)

    repetition = spread([s.params.repetition_penalty for _, s in rows])
    frequency = spread([s.params.frequency_penalty for _, s in rows])
    presence = spread([s.params.presence_penalty for _, s in rows])
    seen = flat[index]
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    flat[index] = seen - frequency * outputs - presence * (outputs > 0)
