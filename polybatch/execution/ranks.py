"""Several GPUs as one: which part of every weight a rank holds, and what ranks tell each other.

Megatron's split (Shoeybi et al. 2019): q, k, v, gate and up by their outputs (whole heads), o and down by
their inputs, whose partial sums are added up once per block. Adapters follow S-LoRA (Sheng et al. 2023,
section 6) in that only rank-wide values are exchanged and nothing is stored twice: every row of A is cut by
its inputs and every row of B by its outputs, so that a rank adds up h = A x over all ranks and writes the
columns of y that are its own. Embedding and vocabulary head lie on rank 0 alone, beside the sampler:
the others get the embedded rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

COLUMN_PARALLEL = ("qkv", "gate_up")
"""Fused products whose outputs are split; their inputs are whole on every rank."""

H_PER_ROW = 256
"""Elements of h for which a captured step has room per row: all seven modules at rank 64."""

MIN_H = 8192

RESERVE_BYTES = 1 << 30
"""Of each GPU, for the library's connections to the others."""

JOIN_TIMEOUT = timedelta(minutes=2)
"""For GPUs to find each other."""

GLOO_TIMEOUT = timedelta(minutes=10)
"""For every exchange between processes; kernels in the interpreter come before it."""

MIN_PART_COLUMNS = 2048
"""Of a part of h, where parts travel between ranks."""


class Ranks:
    """A rank alone: nothing is split, nothing exchanged. `RankGroup` is the one of several."""

    rank = 0
    size = 1

    def reduce(self, x: torch.Tensor) -> None:
        """Add up x over all ranks, in place and in the order of the current stream. x: contiguous."""

    def broadcast(self, x: torch.Tensor) -> None:
        """Give every rank the x of rank 0."""

    def close(self) -> None:
        """Leave the others."""

    def columns(self, width: int) -> slice:
        """This rank's share of a whole axis."""
        share = width // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def adapter_columns(
        self, product: str, x: torch.Tensor, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What this rank's part of adapters reads and writes of a fused product's input and output."""
        if self.size == 1:
            return x, out
        if product in COLUMN_PARALLEL:
            return x[:, self.columns(x.shape[1])], out
        return x, out[:, self.columns(out.shape[1])]

    @staticmethod
    def h_capacity(num_rows: int, max_h: int) -> int:
        """Elements of h that a captured step of so many rows exchanges."""
        return min(max(num_rows * H_PER_ROW, MIN_H), max_h)


ALONE = Ranks()


class RankGroup(Ranks):
    """One of several ranks.

    group: a process group's backend, NCCL for GPUs or gloo for processes. can_abort: whether it knows how.
    What it does may be captured in a CUDA graph once each size of tensor was exchanged before.
    """

    def __init__(self, group: Any, rank: int, size: int, *, can_abort: bool) -> None:
        self.rank, self.size = rank, size
        self._group: Any = group
        self._can_abort = can_abort
        self._sum = dist.AllreduceOptions()
        self._from_first = dist.BroadcastOptions()
        self._from_first.rootRank = 0
        # On the caller's stream, without a detour over one of the library's.
        self._sum.asyncOp = self._from_first.asyncOp = False

    def reduce(self, x: torch.Tensor) -> None:
        if x.numel():
            _finish(self._group.allreduce([x], self._sum))

    def broadcast(self, x: torch.Tensor) -> None:
        if x.numel():
            _finish(self._group.broadcast([x], self._from_first))

    def abort(self) -> None:
        """Give up whatever waits for other ranks on a GPU. Between processes a lost one shows by itself."""
        if self._can_abort and self._group is not None:
            self._group.abort()

    def close(self) -> None:
        """Leave the others, with whatever is left of an exchange; graphs that hold one must be gone.

        Idempotent. The file over which the ranks met must still be there: the library's threads look into it
        while they end, and wait minutes for one that is not.
        """
        self.abort()
        self._group = None


def _finish(work: Any) -> None:
    """Backends that work on the current stream return nothing to wait for."""
    if work is not None:
        work.wait()


def join(store: str, rank: int, size: int, device: torch.device) -> RankGroup:
    """Meet the other ranks; returns when all are there. store: a file's path, the same for all.

    They talk over the loopback interface and between the GPUs; nothing listens to the network.
    """
    held = dist.FileStore(store, size)  # type: ignore[attr-defined]
    group: Any
    if device.type == "cuda":
        with _environment(_NCCL_DEFAULTS):
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = JOIN_TIMEOUT
            group = dist.ProcessGroupNCCL(held, rank, size, options)
            ranks = RankGroup(group, rank, size, can_abort=True)
            ranks.reduce(torch.zeros(1, device=device))
            torch.cuda.synchronize(device)
    else:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = GLOO_TIMEOUT
        group = dist.ProcessGroupGloo(held, rank, size, options)
        ranks = RankGroup(group, rank, size, can_abort=False)
        ranks.reduce(torch.zeros(1))
    return ranks


# Multicast between GPUs is not to be had on every machine, and what is sent here is small. The monitor would
# look into the store for as long as the process lives.
_NCCL_DEFAULTS = {
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}


@contextmanager
def _environment(defaults: dict[str, str]) -> Iterator[None]:
    """Variables that libraries read, where the user has not set them; taken back afterwards."""
    new = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]
