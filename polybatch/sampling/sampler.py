"""From logits to tokens, all rows of a step at once, each row as if it were alone.

    raw logits -> edits (bias, min_tokens, penalties), grammar -> temperature -> top-k, top-p, min-p -> draw

Greedy rows stop after the edits. top-p's mass is that of what top-k left (Holtzman et al. 2020);
min-p is relative to the best token (Nguyen et al. 2024). A draw uses one uniform number keyed by
(seed, completion index, position) and the inverse distribution function in an order fixed by the row:
best first where truncated, by token id where not. So the same row gives the same token in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polybatch.sampling import rows
from polybatch.sampling.edits import edit_logits
from polybatch.sampling.logprobs import TokenLogprobs, gather_logprobs
from polybatch.sampling.masks import mask_logits
from polybatch.sampling.random import uniforms
from polybatch.sampling.state import SamplingState

FIRST_CANDIDATES = 32
MORE_CANDIDATES = 256
"""Nucleus rows look at so few tokens first, then at more, and sort the vocabulary only if they must."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """tokens: one per row. logprobs: row -> details where asked. errors: row -> what is wrong with it;
    the token of such a row means nothing."""

    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


class Sampler:
    """Chooses tokens for rows of logits; keeps no state between calls but what its rows carry."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def sample(self, logits: Tensor, states: SequenceOf[SamplingState]) -> Sampled:
        """Choose the next token of every row.

        logits: [L, vocab_size] float32, not changed. states: one per row; the token's position is the
        sequence's length.
        """
        if not states:
            return Sampled([])
        best, best_ids = rows.argmax(logits)
        tokens: list[int] = best_ids.tolist()
        errors = {}
        if not torch.isfinite(best).all():
            errors = {
                row: f"the model's logits are not finite (best is {value})"
                for row, value in enumerate(best.tolist())
                if value - value != 0.0
            }
        special = [i for i, state in enumerate(states) if not state.is_plain and i not in errors]
        if not special:
            return Sampled(tokens, errors=errors)
        self._choose(logits, states, special, tokens, errors)
        return Sampled(tokens, self._logprobs(logits, states, special, tokens), errors)

    def _choose(
        self,
        logits: Tensor,
        states: SequenceOf[SamplingState],
        special: list[int],
        tokens: list[int],
        errors: dict[int, str],
    ) -> None:
        """Overwrite the tokens of rows that are edited or drawn."""
        changed = [i for i in special if states[i].edits or not states[i].is_greedy]
        if not changed:
            return
        work = logits[torch.tensor(changed, device=logits.device)]
        picked = [states[i] for i in changed]
        if any(state.edits for state in picked):
            edit_logits(work, picked)
        failed = mask_logits(work, picked)
        best, best_ids = rows.argmax(work)
        chosen: list[int] = best_ids.tolist()
        errors.update((changed[j], message) for j, message in failed.items())
        for i, value in zip(changed, best.tolist(), strict=True):
            if value - value != 0.0:
                errors.setdefault(i, "logit_bias, penalties, min_tokens or grammar left no token to choose")
        drawn = [j for j, (i, s) in enumerate(zip(changed, picked, strict=True))
                 if not s.is_greedy and i not in errors]  # fmt: skip
        if drawn:
            part = work if len(drawn) == len(changed) else work[torch.tensor(drawn, device=work.device)]
            for j, token in zip(drawn, self._draw(part, [picked[j] for j in drawn]), strict=True):
                chosen[j] = token
        for i, token in zip(changed, chosen, strict=True):
            tokens[i] = token

    def _draw(self, work: Tensor, states: list[SamplingState]) -> list[int]:
        """Tokens drawn from rows of edited logits, [L, V]; changes them in place."""
        device = work.device
        numbers = torch.from_numpy(uniforms([s.key for s in states], [len(s.seq.tokens) for s in states]))
        numbers = numbers.to(device)
        temperatures = [s.params.temperature for s in states]
        work /= torch.tensor(temperatures, dtype=torch.float32, device=device)[:, None]
        tokens = [0] * len(states)
        for size, members in self._group(states).items():
            index = torch.tensor(members, device=device)
            part, some = work[index], numbers[index]
            if size is None:
                found = rows.sample_softmax(part, some)
            else:
                found = _draw_truncated(part, some, [states[m] for m in members], size)
            for m, token in zip(members, found.tolist(), strict=True):
                tokens[m] = token
        return tokens

    def _group(self, states: list[SamplingState]) -> dict[int | None, list[int]]:
        """Rows by the number of candidates they look at first; None where nothing is truncated."""
        groups: dict[int | None, list[int]] = {}
        for i, state in enumerate(states):
            p = state.params
            size: int | None = None
            if p.top_k:
                size = min(1 << (p.top_k - 1).bit_length(), self.vocab_size)
            elif p.top_p < 1.0 or p.min_p > 0.0:
                size = min(FIRST_CANDIDATES, self.vocab_size)
            groups.setdefault(size, []).append(i)
        return groups

    def _logprobs(
        self, logits: Tensor, states: SequenceOf[SamplingState], special: list[int], tokens: list[int]
    ) -> dict[int, TokenLogprobs]:
        asked = [(i, n) for i in special if (n := states[i].params.logprobs) is not None]
        if not asked:
            return {}
        part = logits[torch.tensor([i for i, _ in asked], device=logits.device)]
        found = gather_logprobs(part, [tokens[i] for i, _ in asked], [n for _, n in asked])
        return {i: entry for (i, _), entry in zip(asked, found, strict=True)}


def _draw_truncated(work: Tensor, numbers: Tensor, states: list[SamplingState], size: int) -> Tensor:
    """Draw from rows cut by top-k, top-p and min-p; all look at `size` candidates."""
    device = work.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

    vocab = work.shape[1]
    top_k = column([float(s.params.top_k or vocab) for s in states])
    top_p = column([s.params.top_p for s in states])
    min_p = column([s.params.min_p for s in states])
    values, ids = rows.top_candidates(work, size)
    weights = (values.double() - values[:, :1].double()).exp()
    weights = weights.masked_fill(torch.arange(weights.shape[1], device=device) >= top_k, 0.0)
    sums = weights.cumsum(dim=1)
    # Without top-k the mass is the whole row's, relative to its best token.
    total = sums[:, -1:]
    if not all(0 < s.params.top_k < vocab for s in states):
        whole = (rows.log_normalizer(work).double()[:, None] - values[:, :1].double()).exp()
        total = torch.where(top_k < vocab, total, whole)
    covered = (top_k < vocab) | (sums[:, -1:] >= top_p * total) | (weights[:, -1:] < min_p)
    keep = (sums - weights < top_p * total) & (weights >= min_p)
    # Rounding must not take the best token away.
    keep[:, 0] = True
    picked = rows.sample_from(weights * keep, numbers)
    tokens = ids.gather(1, picked[:, None])[:, 0]
    if size < vocab and not bool(covered.all()):
        missing = (~covered[:, 0]).nonzero()[:, 0]
        some = [states[i] for i in missing.tolist()]
        more = MORE_CANDIDATES if size < MORE_CANDIDATES < vocab else vocab
        tokens[missing] = _draw_truncated(work[missing], numbers[missing], some, more)
    return tokens
