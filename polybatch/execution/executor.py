"""What the engine asks of a device: carry out a plan, return logits.

An executor owns the weights, the page pool's memory and the kernels; it decides nothing.
`EagerExecutor` is the torch reference, `CpuExecutor` the compiled one; both keep this contract
and one test suite runs over both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from polybatch.adapters.weights import AdapterWeights
from polybatch.config import ModelSpec, PoolSpec
from polybatch.request import Sequence
from polybatch.scheduling.plan import StepPlan


class Executor(Protocol):
    """Runs ragged steps over one model and one page pool."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def pool(self) -> PoolSpec: ...

    def adapter_pages(self, weights: AdapterWeights) -> int:
        """Pages of the pool that this adapter takes while resident."""
        ...

    def forward(self, plan: StepPlan, adapters: Mapping[str, AdapterWeights]) -> torch.Tensor:
        """Carry out a plan: loads, page copies, then the forward pass.

        adapters: digest -> host weights, at least for `plan.loads` and for adapters of the chunks that
        change the vocabulary layers.
        Returns logits [L, vocab] float32, rows in the order of chunks and, within LogitRows.ALL, of
        positions; valid until the next call. L may be 0.
        """
        ...

    def release(self, seq: Sequence) -> None:
        """Forget a sequence that finished or was preempted; its pages belong to the scheduler."""
        ...

    def describe(self) -> dict[str, str]:
        """Kernel chosen per operation and why, for `polybatch info` and the start-up summary."""
        ...

    def close(self) -> None:
        """Stop worker threads and give memory back. Idempotent."""
        ...
