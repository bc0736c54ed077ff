"""The cost model: how long a step takes, from what it moves and computes. No torch.

    shape_of(plan) -> StepShape -> CostModel.predict -> seconds

A step's time is close to linear in a handful of amounts: the weights are read once whatever the batch (the
constant), each token is multiplied by them, each decoding row reads its context, each pair of a query and a key
is multiplied, each adapter that is live is read once. One hinge in the number of tokens stands for the place
where a step stops to wait for memory and starts to wait for arithmetic.
Source: the roofline model (Williams et al. 2009); linear step models as in Vidur (Agrawal et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

from polybatch.scheduling.plan import LogitRows, StepPlan


@dataclass(frozen=True, slots=True)
class StepShape:
    """What of a step costs time.

    num_tokens: new tokens of all chunks. num_decodes: chunks of one token, num_prefill_tokens: tokens of the
    others. decode_context: tokens of KV that the decoding rows read. prefill_pairs: pairs of query and key
    in the other chunks. num_logits: rows of logits. num_adapters, adapter_pages: distinct adapters of the
    chunks, adapter_tokens: tokens that have one. load_pages: pages of adapters that are loaded before it.
    """

    num_tokens: int = 0
    num_decodes: int = 0
    num_prefill_tokens: int = 0
    decode_context: int = 0
    prefill_pairs: int = 0
    num_logits: int = 0
    num_adapters: int = 0
    adapter_pages: int = 0
    adapter_tokens: int = 0
    load_pages: int = 0


SHAPE_FIELDS = tuple(field.name for field in fields(StepShape))


class StepCosts(Protocol):
    """Whatever predicts a step: a fitted model, one that corrects itself, a table in a test."""

    def predict(self, shape: StepShape) -> float:
        """Seconds of a step of this shape."""
        ...


def shape_of(plan: StepPlan) -> StepShape:
    """The amounts of a planned step. O(chunks)."""
    num_decodes = num_prefill = context = pairs = num_logits = adapter_tokens = 0
    for chunk in plan.chunks:
        n_new, start = chunk.n_new, chunk.start
        if n_new == 1:
            num_decodes += 1
            context += start + 1
        else:
            num_prefill += n_new
            pairs += n_new * start + n_new * (n_new + 1) // 2
        if chunk.logits is LogitRows.LAST:
            num_logits += 1
        elif chunk.logits is LogitRows.ALL:
            num_logits += n_new
        if chunk.seq.adapter is not None:
            adapter_tokens += n_new
    return StepShape(
        num_tokens=num_decodes + num_prefill,
        num_decodes=num_decodes,
        num_prefill_tokens=num_prefill,
        decode_context=context,
        prefill_pairs=pairs,
        num_logits=num_logits,
        num_adapters=len(plan.resident),
        adapter_pages=sum(map(len, plan.resident.values())),
        adapter_tokens=adapter_tokens,
        load_pages=sum(len(load.pages) for load in plan.loads),
    )


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds = base + sum of coefficient x amount, with a hinge in the number of tokens.

    All coefficients are seconds per unit and not negative. hinge: tokens from which on each costs
    `per_token_beyond` more.
    """

    base: float
    per_token: float = 0.0
    hinge: int = 0
    per_token_beyond: float = 0.0
    per_decode: float = 0.0
    per_context: float = 0.0
    per_pair: float = 0.0
    per_logit: float = 0.0
    per_adapter: float = 0.0
    per_adapter_page: float = 0.0
    per_adapter_token: float = 0.0
    per_load_page: float = 0.0

    def predict(self, shape: StepShape) -> float:
        """Seconds of a step of this shape."""
        return (
            self.base
            + self.per_token * shape.num_tokens
            + self.per_token_beyond * max(0, shape.num_tokens - self.hinge)
            + self.per_decode * shape.num_decodes
            + self.per_context * shape.decode_context
            + self.per_pair * shape.prefill_pairs
            + self.per_logit * shape.num_logits
            + self.per_adapter * shape.num_adapters
            + self.per_adapter_page * shape.adapter_pages
            + self.per_adapter_token * shape.adapter_tokens
            + self.per_load_page * shape.load_pages
        )
