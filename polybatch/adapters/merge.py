"""A base model with one adapter merged into its weights, as `ModelWeights` of its own.

The oracle for adapters: run as a plain model, it owes the same logits as the base model with the adapter
beside it. Not meant for serving: it takes a whole model per adapter.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from polybatch.adapters.weights import AdapterWeights, ModuleDelta, VocabularyDelta
from polybatch.config import ModelSpec
from polybatch.models.weights import LayerWeights, ModelWeights


class MergedWeights:
    """`ModelWeights` of base and adapter; every tensor that the adapter changes is float32.

    W becomes gain * (W + bᵀ a), a bias becomes bias + delta, the vocabulary's tables are replaced or added
    to. A tied model is untied, because an adapter may change either end alone.
    """

    def __init__(self, base: ModelWeights, adapter: AdapterWeights) -> None:
        self._base = base
        self._adapter = adapter

    @property
    def spec(self) -> ModelSpec:
        return replace(self._base.spec, tie_embeddings=False)

    def embedding(self) -> torch.Tensor:
        return _merged_table(self._base.embedding(), self._adapter.embedding)

    def lm_head(self) -> torch.Tensor:
        return _merged_table(self._base.lm_head(), self._adapter.lm_head)

    def final_norm(self) -> torch.Tensor:
        return self._base.final_norm()

    def layer(self, index: int) -> LayerWeights:
        layer = self._base.layer(index)
        changed: dict[str, torch.Tensor] = {}
        for module, delta in self._adapter.layers[index].items():
            short = module.removesuffix("_proj")
            changed[short] = _merged_linear(getattr(layer, short), delta)
            if delta.bias is not None:
                bias = getattr(layer, f"{short}_bias")
                changed[f"{short}_bias"] = delta.bias.float() if bias is None else bias.float() + delta.bias
        return replace(layer, **changed)

    def linear(self, layer: int, module: str) -> torch.Tensor:
        weight = self._base.linear(layer, module)
        delta = self._adapter.layers[layer].get(module)
        return weight if delta is None else _merged_linear(weight, delta)


def _merged_linear(weight: torch.Tensor, delta: ModuleDelta) -> torch.Tensor:
    merged = weight.float().addmm(delta.b.T.float(), delta.a.float())
    return merged if delta.gain is None else merged * delta.gain[:, None]


def _merged_table(table: torch.Tensor, delta: VocabularyDelta | None) -> torch.Tensor:
    if delta is None:
        return table
    if delta.full is not None:
        return delta.full
    assert delta.left is not None
    assert delta.right is not None
    return table.float().addmm(delta.left, delta.right)


__all__ = ["MergedWeights"]
