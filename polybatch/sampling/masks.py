"""Tokens that grammars forbid: their logits become -inf, all rows of a batch at once."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from polybatch.sampling.state import SamplingState
from polybatch.structured.grammar import Bitmask, fill_masks

WORD_BITS = 32


def mask_logits(logits: Tensor, states: SequenceOf[SamplingState]) -> dict[int, str]:
    """Bring matchers up to date with their sequences, and mask their rows in place.

    logits: [L, V] float32, one row per state; rows without a matcher are left alone. Returns row -> message
    where a grammar cannot be followed any further.
    """
    found = [(row, state) for row, state in enumerate(states) if state.matcher is not None]
    if not found:
        return {}
    matchers = []
    for _, state in found:
        assert state.matcher is not None
        state.matcher.advance(state.seq.tokens, state.seq.num_prompt)
        matchers.append(state.matcher)
    vocab = logits.shape[1]
    masks = np.zeros((len(found), -(-vocab // WORD_BITS)), dtype=np.int32)
    fill_masks(matchers, masks)
    is_forbidden = _forbidden(masks, vocab, logits.device)
    if len(found) == len(states):
        logits.masked_fill_(is_forbidden, -torch.inf)
    else:
        rows = torch.tensor([row for row, _ in found], device=logits.device)
        logits[rows] = logits[rows].masked_fill_(is_forbidden, -torch.inf)
    return {
        row: matcher.error
        for (row, _), matcher in zip(found, matchers, strict=True)
        if matcher.error is not None
    }


def _forbidden(masks: Bitmask, vocab: int, device: torch.device) -> Tensor:
    """One bool per token, [rows, vocab], True where the bit is 0."""
    if device.type == "cpu":
        bits = np.unpackbits((~masks).view(np.uint8), axis=1, bitorder="little", count=vocab)
        return torch.from_numpy(bits).view(torch.bool)
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=device)
    words = torch.from_numpy(masks).to(device)
    return ((words[:, :, None] >> shifts) & 1).flatten(1)[:, :vocab] == 0
