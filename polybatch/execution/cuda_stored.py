"""Linear weights of quantised checkpoints that the GPU's kernels take as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from polybatch.kernels.linear.cuda_pack import holds_exactly
from polybatch.models.quantized_weights import QuantizedTensor, concatenate
from polybatch.models.weights import ModelWeights


@runtime_checkable
class StoredLinears(Protocol):
    """Weights that give a linear layer's integers, scales and zeros; None where it is stored in floats."""

    def quantized_linear(self, layer: int, module: str) -> QuantizedTensor | None: ...


def stored_product(
    weights: ModelWeights, layer: int, modules: Sequence[str], scheme: str | None
) -> QuantizedTensor | None:
    """The weights of modules that are computed together, stacked along their outputs, as they are stored.

    scheme: of `kernels.linear.cuda.pack`. None where the checkpoint holds something else, holds the modules
    differently from each other, or holds them so that the kernels would change a value: then floats are
    packed, which rounds a second time.
    """
    if scheme is None or not isinstance(weights, StoredLinears):
        return None
    found = [weights.quantized_linear(layer, module) for module in modules]
    stored = [weight for weight in found if weight is not None and scheme.startswith(weight.kind)]
    if len(stored) < len(found) or len({weight.group_size for weight in stored}) > 1:
        return None
    product = concatenate(stored)
    return product if product.kind != "int4" or holds_exactly(product) else None
