"""The small models of tests/helpers.py, smaller still, and a record of what loading reads of them."""

from __future__ import annotations

import helpers
import torch
from helpers import HFWeights
from transformers import PreTrainedModel

SIZES = {
    "vocab_size": 41, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


def tiny_model(name: str = "llama", **changes: object) -> PreTrainedModel:
    """A random model with untied embeddings unless the changes say otherwise."""
    return helpers.tiny_model(name, seed=7, **{**SIZES, **changes})


class RecordingWeights(HFWeights):
    """`linear_reads` holds the (layer, module) of each single weight that was asked for."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.linear_reads: list[tuple[int, str]] = []

    def linear(self, layer: int, module: str) -> torch.Tensor:
        self.linear_reads.append((layer, module))
        return super().linear(layer, module)
