"""The weights of a mixture: its adapters' pairs one below the other, and the few mixtures that are kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from polybatch.adapters.weights import AdapterWeights, ModuleDelta
from polybatch.errors import RequestError
from polybatch.request import AdapterRef

MAX_MIXTURES = 64
MAX_MIXTURE_BYTES = 1 << 30
"""Host memory of mixtures that no request uses, beside the one used last."""

FLOAT_BYTES = 4


def mix_weights(digest: str, parts: Sequence[tuple[str, AdapterWeights, float]]) -> AdapterWeights:
    """The sum of low-rank adapters, each times its scale: rows of `a` stacked, those of `b` scaled before.

    parts: (name for errors, weights, scale). The result's modules have the sum of the parts' ranks.
    Raises RequestError for an adapter that is more than low-rank pairs: a DoRA gain multiplies what the
    others add, and what a scale means for a bias or a replaced table is not agreed on.
    Equals peft's `add_weighted_adapter(combination_type="cat")`.
    """
    for name, weights, _ in parts:
        if reason := _beyond_pairs(weights):
            raise RequestError(
                f"adapter {name!r} has {reason} and cannot be mixed or scaled: use it alone with scale 1, "
                "or merge it offline",
                field="adapter",
            )
    layers = []
    for deltas in zip(*(weights.layers for _, weights, _ in parts), strict=True):
        modules = dict.fromkeys(module for layer in deltas for module in layer)
        layers.append({
            module: _stack([(layer[module], part[2])
                            for layer, part in zip(deltas, parts, strict=True) if module in layer])
            for module in modules
        })  # fmt: skip
    return AdapterWeights(digest, tuple(layers), info={"kind": "mixture"})


def num_bytes(weights: AdapterWeights) -> int:
    """Host memory of an adapter's pairs."""
    return FLOAT_BYTES * sum(d.a.numel() + d.b.numel() for layer in weights.layers for d in layer.values())


class MixtureCache:
    """Which mixtures were used last; least recently used ones are given up first."""

    def __init__(self, max_mixtures: int = MAX_MIXTURES, max_bytes: int = MAX_MIXTURE_BYTES) -> None:
        self._max_mixtures, self._max_bytes = max_mixtures, max_bytes
        self._entries: OrderedDict[str, tuple[AdapterRef, int]] = OrderedDict()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, digest: str) -> AdapterRef | None:
        entry = self._entries.get(digest)
        if entry is None:
            return None
        self._entries.move_to_end(digest)
        return entry[0]

    def put(self, ref: AdapterRef, size: int) -> list[str]:
        """Keep a mixture of so many bytes; returns the digests that have to go."""
        self._entries[ref.digest] = (ref, size)
        self._num_bytes += size
        gone = []
        while len(self._entries) > 1 and (
            len(self._entries) > self._max_mixtures or self._num_bytes > self._max_bytes
        ):
            digest, (_, freed) = self._entries.popitem(last=False)
            self._num_bytes -= freed
            gone.append(digest)
        return gone


def _stack(deltas: list[tuple[ModuleDelta, float]]) -> ModuleDelta:
    return ModuleDelta(
        torch.cat([delta.a for delta, _ in deltas]),
        torch.cat([scale * delta.b.float() for delta, scale in deltas]),
    )


def _beyond_pairs(weights: AdapterWeights) -> str | None:
    deltas = [delta for layer in weights.layers for delta in layer.values()]
    if any(delta.gain is not None for delta in deltas):
        return "DoRA magnitudes"
    if any(delta.bias is not None for delta in deltas):
        return "trained biases"
    if weights.embedding is not None or weights.lm_head is not None:
        return "changes of embed_tokens or lm_head"
    return None


__all__ = ["MixtureCache", "mix_weights"]
