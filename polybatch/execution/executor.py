"""What the engine asks of a device: carry out a plan, return logits.

An executor owns the weights, the page pool's memory and the kernels; it decides nothing.
`EagerExecutor` is the torch reference, `CpuExecutor` and `CudaExecutor` are the fast ones; all keep this
contract and one test suite runs over them. A device that works apart from Python keeps
`AheadExecutor` too: it samples by itself, so that the next step is planned while this one runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Protocol, runtime_checkable

import torch

from polybatch.adapters.weights import AdapterWeights
from polybatch.config import ModelSpec, PoolSpec
from polybatch.request import Sequence
from polybatch.sampling.sampler import Sampled
from polybatch.sampling.state import SamplingState
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


@runtime_checkable
class PackingExecutor(Executor, Protocol):
    """An executor that loads adapters best from host memory of its own making."""

    def pack_adapter(self, weights: AdapterWeights) -> AdapterWeights:
        """The adapter in such memory and in the pool's dtype. Loads are fast for what this returned, and
        whoever keeps that need not keep `weights`."""
        ...


class Launch(Protocol):
    """A step that was handed to the device."""

    def sampled(self) -> Sampled:
        """Wait for the step; its tokens, one per sampled row."""
        ...


@runtime_checkable
class AheadExecutor(Executor, Protocol):
    """An executor that runs steps behind the caller's back, in the order of their launches.

    Both `forward` and `launch` accept sequences whose newest token is PENDING: it is the one that the
    launch before sampled for that sequence, and never leaves the device.
    """

    def can_sample(self, state: SamplingState) -> bool:
        """Whether `launch` can choose this row's tokens; else the host does, after `forward`."""
        ...

    def launch(
        self,
        plan: StepPlan,
        adapters: Mapping[str, AdapterWeights],
        rows: SequenceOf[int],
        states: SequenceOf[SamplingState],
    ) -> Launch:
        """Start a step and return. `forward`'s arguments, and of its logits the rows to sample, with
        their states, one each. Raises what `forward` raises; faults of the device come with `sampled`."""
        ...
