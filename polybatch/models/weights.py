"""Weights of a decoder-only model as the executors take them, one layer at a time.

A family file maps a checkpoint's tensor names onto these fields; nothing else knows those names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from polybatch.config import ModelSpec


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Linear weights are [out, in] in the checkpoint's float dtype.

    q and k are laid out for the half-split rotation (x1, x2 = first and second half of a head).
    """

    input_norm: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    post_attention_norm: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    q_bias: torch.Tensor | None = None
    k_bias: torch.Tensor | None = None
    v_bias: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None


class ModelWeights(Protocol):
    """Lazy access: every call reads (and dequantises) afresh, so that packing never holds two copies."""

    @property
    def spec(self) -> ModelSpec: ...

    def embedding(self) -> torch.Tensor:
        """[vocab, hidden]."""
        ...

    def lm_head(self) -> torch.Tensor:
        """[vocab, hidden]; the embedding where the checkpoint ties them."""
        ...

    def final_norm(self) -> torch.Tensor:
        """[hidden]."""
        ...

    def layer(self, index: int) -> LayerWeights: ...

    def linear(self, layer: int, module: str) -> torch.Tensor:
        """One linear weight, [out, in], by its module name ("q_proj" … "down_proj")."""
        ...
