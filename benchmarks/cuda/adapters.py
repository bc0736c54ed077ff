"""Random LoRAs in host memory, as many and as large as a benchmark registers, without as much memory.

All values are windows of one random buffer, each adapter's at places of its own: digests differ, a load moves
all of an adapter's bytes from host memory, and what lies in the pool is as distinct as it would be. Only the
host's copy is shared: a thousand adapters of an 8B model with a mean rank of 30 would take 160 GB there.
The buffer is larger than a server's last-level cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from polybatch.adapters.store import AdapterStore
from polybatch.adapters.weights import AdapterWeights, ModuleDelta
from polybatch.config import ModelSpec

BUFFER_BYTES = 2**30
ALIGN = 32
"""In values: rows begin on 64 bytes at 16 bits."""

STD = 0.01
"""Of all values: enough to change the outputs, too little to blow them up."""


class RandomAdapters:
    """Makes adapters on all seven linears for one model.

    dtype: bfloat16 halves the bytes that a load moves; the CPU's executor wants float32.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
        buffer_bytes: int = BUFFER_BYTES,
        seed: int = 0,
    ) -> None:
        """device: where the values are drawn; they are kept on the host."""
        self._spec = spec
        generator = torch.Generator(device).manual_seed(seed)
        longest = max(max(shape) for shape in spec.linear_shapes.values())
        num_values = max(buffer_bytes // dtype.itemsize, 128 * longest)
        drawn = torch.empty(num_values, dtype=dtype, device=device).normal_(0, STD, generator=generator)
        # Pinned, so that loads copy from where the windows lie.
        self._values = torch.empty(num_values, dtype=dtype, pin_memory=torch.cuda.is_available())
        self._values.copy_(drawn)
        self._next = 0

    def make(self, name: str, rank: int) -> AdapterWeights:
        layers = []
        for _ in range(self._spec.num_layers):
            layer = {}
            for module, (out, width) in self._spec.linear_shapes.items():
                layer[module] = ModuleDelta(self._window(rank, width), self._window(rank, out))
            layers.append(layer)
        digest = hashlib.sha256(f"random adapter {name} of rank {rank}".encode()).hexdigest()
        return AdapterWeights(digest, tuple(layers))

    def register(self, store: AdapterStore, ranks: Mapping[str, int]) -> None:
        """Make and add adapters that the store does not have yet."""
        known = {ref.name for ref in store.list()}
        for name, rank in ranks.items():
            if name not in known:
                store.add_weights(name, self.make(name, rank))

    def _window(self, rows: int, width: int) -> torch.Tensor:
        """[rows, width], contiguous, from where the last window ended."""
        count = rows * width
        if self._next + count > len(self._values):
            self._next = 0
        start = self._next
        self._next += -(-count // ALIGN) * ALIGN
        return self._values[start : start + count].view(rows, width)
