"""An adapter's tensors in host memory, as copies to a GPU want them: few long runs of bytes, pinned.

`locate` finds the runs in which tensors lie already; `pack` moves them into such runs. The pool's dtype is
taken on then, once. Loads move the tensors of decoder layers, in the order of `stored`; changes of the
vocabulary layers stay as they are.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from polybatch.adapters.weights import AdapterWeights, ModuleDelta

logger = logging.getLogger("polybatch.adapters")

ALIGN_BYTES = 64
MIN_SLAB_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class HostRuns:
    """Where an adapter's tensors lie.

    runs: uint8, contiguous; they keep the memory alive. starts: of every tensor of `stored` that is not
    empty, its first byte in the runs laid end to end, each on 64 bytes. run_starts: the same of the runs.
    """

    runs: tuple[torch.Tensor, ...]
    run_starts: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.runs))

    @property
    def is_compact(self) -> bool:
        """Whether the runs are so few that each may be a copy of its own."""
        return len(self.runs) <= 4 + self.num_bytes // (4 << 20)

    def suits(self, *, pin: bool) -> bool:
        """Whether `pack` leaves the tensors where they are."""
        return self.is_compact and (not pin or all(run.is_pinned() for run in self.runs))


def stored(weights: AdapterWeights) -> Iterator[torch.Tensor]:
    """The tensors that lie in pages: layer by layer, modules by name, `a`, `b`, gain, bias."""
    for layer in weights.layers:
        for _, delta in sorted(layer.items()):
            yield from (x for x in (delta.a, delta.b, delta.gain, delta.bias) if x is not None)


def locate(weights: AdapterWeights, dtype: torch.dtype) -> HostRuns | None:
    """The runs in which the tensors lie, None if one has another dtype or is not contiguous."""
    tensors = [tensor for tensor in stored(weights) if tensor.numel()]
    if any(x.dtype != dtype or not x.is_contiguous() or x.device.type != "cpu" for x in tensors):
        return None
    begins = np.array([x.data_ptr() for x in tensors], np.int64)
    sizes = np.array([x.numel() for x in tensors], np.int64) * dtype.itemsize
    storages = [x.untyped_storage() for x in tensors]
    bases = np.array([storage.data_ptr() for storage in storages], np.int64)
    order = np.argsort(begins, kind="stable")
    begin, base = begins[order], bases[order]
    # Tensors may overlap: windows of one buffer.
    end = np.maximum.accumulate(begin + sizes[order])
    is_new = (begin[1:] >= end[:-1] + ALIGN_BYTES) | (base[1:] != base[:-1])
    edges = [0, *(np.flatnonzero(is_new) + 1).tolist(), len(tensors)] if tensors else [0]
    runs, run_starts, starts, total = [], [], np.zeros(len(tensors), np.int64), 0
    for low, high in itertools.pairwise(edges):
        first = int(begin[low])
        run = torch.empty(0, dtype=torch.uint8).set_(
            storages[order[low]], first - int(base[low]), (int(end[high - 1]) - first,), (1,)
        )
        starts[order[low:high]] = total + begin[low:high] - first
        runs.append(run)
        run_starts.append(total)
        total += _aligned(len(run))
    return HostRuns(tuple(runs), np.array(run_starts, np.int64), starts)


def pack(weights: AdapterWeights, dtype: torch.dtype, *, pin: bool) -> AdapterWeights:
    """The adapter with all tensors of its layers in few runs of this dtype; itself where that is so already.

    pin: in pinned memory. Where the system gives none, tensors stay, or come to lie, in pageable memory: a
    mapped file will do. Copies from there pass through the driver's own pinned memory while the caller waits.
    """
    held = locate(weights, dtype)
    if held is not None and held.suits(pin=pin):
        return weights
    slabs = _Slabs(sum(_aligned(x.numel() * dtype.itemsize) for x in stored(weights)), pin)
    try:
        return _moved(weights, dtype, slabs)
    except RuntimeError as error:
        if not pin:
            raise
        logger.warning(
            "adapter %s cannot be pinned in host memory (%s); its loads will be slow: "
            "register fewer adapters or raise the limit of locked memory",
            weights.digest[:12],
            error,
        )
    return weights if held is not None and held.is_compact else pack(weights, dtype, pin=False)


class _Slabs:
    """Memory for tensors of `num_bytes` in all, handed out one after the other.

    Pinned memory is allocated in powers of two, so slabs of such sizes waste little of it.
    """

    def __init__(self, num_bytes: int, pin: bool) -> None:
        self._left, self._pin = num_bytes, pin
        self._slab, self._used = torch.empty(0, dtype=torch.uint8), 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8, on 64 bytes."""
        size = _aligned(num_bytes)
        if self._used + size > len(self._slab):
            room = self._left
            if self._pin:
                room = max(1 << (self._left.bit_length() - 1), size, min(self._left, MIN_SLAB_BYTES))
            self._slab, self._used = torch.empty(room, dtype=torch.uint8, pin_memory=self._pin), 0
        taken = self._slab[self._used : self._used + num_bytes]
        self._used += size
        self._left -= size
        return taken


def _moved(weights: AdapterWeights, dtype: torch.dtype, slabs: _Slabs) -> AdapterWeights:
    def moved(values: torch.Tensor) -> torch.Tensor:
        target = slabs.take(values.numel() * dtype.itemsize).view(dtype).view(values.shape)
        return target.copy_(values)

    layers: list[dict[str, ModuleDelta]] = []
    for layer in weights.layers:
        deltas = {}
        for module, delta in sorted(layer.items()):
            a, b = moved(delta.a), moved(delta.b)
            gain, bias = (None if x is None else moved(x) for x in (delta.gain, delta.bias))
            deltas[module] = ModuleDelta(a, b, gain, bias)
        layers.append(deltas)
    return replace(weights, layers=tuple(layers))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES


__all__ = ["HostRuns", "locate", "pack", "stored"]
