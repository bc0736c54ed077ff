"""An adapter as weights, whatever checkpoint it came from: what loaders yield and executors load.

The engine sees low-rank pairs per linear layer, stored so that one rank is one contiguous row of `a`
and one of `b`, plus the few dense vectors that some PEFT methods add.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class ModuleDelta:
    """What an adapter does to one linear layer y = W x + b of one decoder layer.

    y = gain * (W x + bT (a x)) + b + bias, with gain = 1 and bias = 0 where absent.

    a: [rank, in]; b: [rank, out], the adapter's scaling already multiplied into it.
    gain: [out], DoRA's magnitude over the norm of the adapted weight (Liu et al. 2024).
    bias: [out], the trained bias minus the base layer's bias.
    All float32, or the pool's dtype once an executor packed them; contiguous, finite. rank 0 is allowed
    (a bias or a gain alone).
    """

    a: torch.Tensor
    b: torch.Tensor
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class VocabularyDelta:
    """What an adapter does to the embedding table or to lm_head, both [vocab, hidden].

    Either `full` replaces the whole table, or the table becomes W + left @ right with
    left [vocab, rank], right [rank, hidden], scaling included. All float32.
    """

    full: torch.Tensor | None = None
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, weakref_slot=True)
class AdapterWeights:
    """A checked adapter in host memory.

    digest: SHA-256 (hex) over its normalised content; names play no part in it.
    layers: one dict per decoder layer, module name ("q_proj" … "down_proj") -> delta.
    embedding, lm_head: present where the adapter changes them.
    """

    digest: str
    layers: tuple[dict[str, ModuleDelta], ...]
    embedding: VocabularyDelta | None = None
    lm_head: VocabularyDelta | None = None
    path: str = ""
    info: dict[str, str] = field(default_factory=dict)

    @property
    def max_rank(self) -> int:
        return max((d.rank for layer in self.layers for d in layer.values()), default=0)


__all__ = ["AdapterWeights", "ModuleDelta", "VocabularyDelta"]
