"""A rank other than 0: an interpreter that holds its part of the model and does what rank 0 announces.

    python -m polybatch.execution.parallel_worker FD

FD is the number of its end of a socket pair. It decides nothing and answers nothing but what it does while it
starts, and why it ends. When rank 0 goes away the process ends.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import select
import signal
import socket
import sys
import threading
import time

import numpy as np
import torch

from polybatch.adapters.weights import AdapterWeights, ModuleDelta
from polybatch.config import ModelSpec
from polybatch.errors import ConfigError, EngineError
from polybatch.execution import parallel_messages as ms
from polybatch.execution.cuda_adapters import CudaAdapters
from polybatch.execution.cuda_graphs import Variant
from polybatch.execution.cuda_model import run_layers
from polybatch.execution.cuda_stage import StageOperations
from polybatch.execution.parallel import ShardedExecutor
from polybatch.execution.ranks import join
from polybatch.execution.sharding import Shard, ShardedWeights, SumScale
from polybatch.kernels import interpret
from polybatch.models.loader import load_model
from polybatch.models.random_weights import open_random
from polybatch.models.weights import ModelWeights

logger = logging.getLogger("polybatch.execution")

ORPHAN_S = 5.0
"""Time to end by itself once rank 0 is gone; it may wait for rank 0 on the GPU."""


class Follower(ShardedExecutor):
    """A rank that runs the steps of rank 0. Its adapters are parts, cut for it."""

    def __init__(self, weights: ModelWeights, **settings: object) -> None:
        self._held: dict[str, AdapterWeights] = {}
        super().__init__(weights, **settings)

    def _make_adapters(self, rows: ModelSpec, dtype: torch.dtype) -> CudaAdapters:
        self._row_shapes = rows.linear_shapes
        return super()._make_adapters(rows, dtype)

    def close(self) -> None:
        super().close()
        self._ranks.close()

    @torch.no_grad()
    def follow(self, message: ms.ToRank) -> None:
        """Do what rank 0 did. Raises EngineError for what no rank 0 of this configuration says."""
        match message:
            case ms.Step():
                self._follow_step(message)
            case ms.Place():
                self._adapters.place(message.digests, message.resident)
                if self._is_cuda:
                    self._adapters.wait(message.digests)
            case ms.Load():
                self._adapters.load(self._held[message.digest], message.pages)
            case ms.Copy():
                for src, dst in message.pages:
                    self.memory.copy_page(src, dst)
            case ms.Adapter():
                self._keep(message)
            case _:
                raise EngineError(f"rank 0 sent {type(message).__name__} to a rank that runs")

    def _follow_step(self, step: ms.Step) -> None:
        stage = self._decode if step.is_decode else self._mixed
        stage.fields.open()
        raw = stage.fields.raw
        if len(raw) != len(step.fields):
            raise EngineError(
                f"rank 0 lays a step out in {len(step.fields):,} bytes, this rank in {len(raw):,}: all GPUs "
                "of a model must be of one kind"
            )
        raw[:] = np.frombuffer(step.fields, np.uint8)
        stage.fields.send()
        self._table.send(
            np.frombuffer(step.page_indices, np.int64), np.frombuffer(step.page_values, np.int32)
        )
        if step.graph is not None:
            graphs = self._graphs if step.is_decode else self._mixed_graphs
            assert graphs is not None
            graphs.replay(step.num_rows, Variant(step.graph))
            return
        operations = StageOperations(
            stage, step.num_rows, lora=step.lora, works=dict(step.attention),
            rescale=self._rescale(step.digests, step.segments),
        )  # fmt: skip
        run_layers(self._weights, self._space, operations, step.num_rows)

    def _keep(self, message: ms.Adapter) -> None:
        kind = self.memory.dtype

        def vector(data: bytearray | None, dtype: torch.dtype = kind) -> torch.Tensor | None:
            return None if data is None else torch.frombuffer(data, dtype=dtype)

        def rows(data: bytearray, rank: int, width: int) -> torch.Tensor:
            return torch.frombuffer(data, dtype=kind).view(rank, width) if rank else torch.empty(0, width)

        layers: list[dict[str, ModuleDelta]] = []
        scales: list[dict[str, SumScale]] = []
        for held in message.layers:
            layer, scaled = {}, {}
            for module, part in held.items():
                out, into = self._row_shapes[module]
                a, b = rows(part.a, part.rank, into), rows(part.b, part.rank, out)
                layer[module] = ModuleDelta(a, b, vector(part.gain), vector(part.bias))
                gain = vector(part.sum_gain, torch.float32)
                bias = vector(part.sum_bias, torch.float32)
                if gain is not None and bias is not None:
                    scaled[module] = SumScale(gain, bias)
            layers.append(layer)
            scales.append(scaled)
        self._held[message.digest] = self._adapters.pack(AdapterWeights(message.digest, tuple(layers)))
        self._keep_scales(message.digest, tuple(scales))


def load(start: ms.Start, sock: socket.socket) -> Follower:
    """Open the model, meet the other ranks, take this rank's part. Raises ConfigError or ModelError."""

    def say(name: str, done: int = 0, total: int = 0) -> None:
        sock.sendall(ms.encode(ms.Phase(name, done, total)))

    say(ms.OPENING)
    device = torch.device(start.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        interpret.prepare()
    weights: ModelWeights
    if start.model.startswith("random:"):
        draw_on = "cpu" if start.draw_on == "cpu" else start.device
        weights = open_random(start.model.removeprefix("random:"), device=draw_on)[0]
    else:
        weights = load_model(start.model, progress=lambda line: say(ms.OPENING)).weights
    say(ms.JOINING)
    ranks = join(start.store, start.rank, start.size, device)
    say(ms.BUILDING)
    own = ShardedWeights(weights, Shard(start.rank, start.size))
    try:
        follower = Follower(
            own, ranks=ranks, device=start.device, **start.settings,
            progress=lambda what, done, total: say(f"{ms.BUILDING}, {what}", done, total),
        )  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"device {start.device} has less free memory than rank 0's, whose pool of pages it must hold as "
            f"well ({error}): free memory on it, or lower memory"
        ) from error
    say(ms.FOLLOWING)
    return follower


def serve(sock: socket.socket) -> int:
    """Follow rank 0 to the end; returns the exit status."""
    start = ms.receive_to_rank(sock)
    if not isinstance(start, ms.Start):
        return 1
    logging.basicConfig(format=f"%(asctime)s %(levelname)s rank {start.rank} %(name)s: %(message)s")
    try:
        follower = load(start, sock)
        while True:
            match message := ms.receive_to_rank(sock):
                case None:
                    # What is left may wait for rank 0 on the GPU.
                    os._exit(0)
                case ms.Shutdown():
                    follower.close()
                    return 0
                case _:
                    follower.follow(message)
    except Exception as error:
        # Whatever it is, rank 0 must hear of it.
        logger.debug("this rank ends", exc_info=True)
        sock.sendall(ms.encode(ms.failed(error)))
        return 1


def _end_with(sock: socket.socket) -> None:
    """Thread: see that the process does not outlive rank 0."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP | select.POLLHUP)
    poll.poll()
    time.sleep(ORPHAN_S)
    os._exit(1)


def main() -> None:
    # Rank 0 asks so where all threads stand, also of a rank that is caught in a library.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        threading.Thread(target=_end_with, args=(sock,), daemon=True).start()
        try:
            status = serve(sock)
        except ConnectionError:
            status = 1
        logging.shutdown()
        # Taking the interpreter down would only wait for ranks that are gone already.
        os._exit(status)


if __name__ == "__main__":
    main()
