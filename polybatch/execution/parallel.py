"""Tensor parallelism: one executor over several GPUs of a host, a process for each.

This process holds the scheduler and rank 0. It lays a step out once; as all ranks have equal parts, the
arrays that describe it are the same on all of them, so the others get those bytes and launch the same kernels
over their own weights (`parallel_worker`). What is exchanged on the device stands in `ranks`. Nothing comes
back: rank 0 alone has embeddings, logits and sampled tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch

from polybatch.adapters.weights import AdapterWeights
from polybatch.config import ModelSpec
from polybatch.execution import parallel_messages as ms
from polybatch.execution.cuda import CudaExecutor, CudaLaunch
from polybatch.execution.cuda_adapters import CudaAdapters
from polybatch.execution.cuda_stage import Filled, Rescale, Stage
from polybatch.execution.cuda_step import Array, Int64s
from polybatch.execution.ranks import RankGroup, join
from polybatch.execution.sharding import Shard, ShardedWeights, SumScales, shard_adapter, shard_spec
from polybatch.execution.team import Team
from polybatch.kernels import interpret
from polybatch.models.weights import ModelWeights
from polybatch.sampling.sampler import Sampled
from polybatch.sampling.state import SamplingState
from polybatch.scheduling.plan import StepPlan


class ShardedExecutor(CudaExecutor):
    """One rank of several; see `CudaExecutor`. scales: of adapters that do something to sums over ranks."""

    def __init__(self, weights: ModelWeights, **settings: Any) -> None:
        self._scales: dict[str, SumScales] = {}
        super().__init__(weights, **settings)

    def _keep_scales(self, digest: str, scales: SumScales) -> None:
        if any(scales):
            self._scales[digest] = scales

    def _rescale(self, digests: SequenceOf[str], segments: SequenceOf[SequenceOf[int]]) -> Rescale | None:
        """Rare, so it takes an exchange of its own: each rank changes its columns, then all get all."""
        ranks, held = self._ranks, [self._scales.get(digest) for digest in digests]
        if not any(held):
            return None

        def rescale(layer: int, product: str, out: torch.Tensor) -> None:
            columns, changed = ranks.columns(out.shape[1]), torch.zeros_like(out)
            rows = []
            for start, stop, index in segments:
                scales = held[index]
                scale = None if scales is None else scales[layer].get(f"{product}_proj")
                if scale is None:
                    continue
                gain, bias = scale.gain.to(out.device), scale.bias.to(out.device)
                changed[start:stop, columns] = (out[start:stop, columns].float() * gain + bias).to(out.dtype)
                rows.append(slice(start, stop))
            if rows:
                ranks.reduce(changed)
            for part in rows:
                out[part] = changed[part]

        return rescale


class ParallelExecutor(ShardedExecutor):
    """Rank 0 of `size`, with the processes of the others; an `AheadExecutor`.

    weights: of the whole model. model: what the other ranks open it by, see `load_model`. draw_on: the device
    on which `weights` draws, where it is random. device: rank 0's; the others take those that follow.
    settings: as of `CudaExecutor`.

    Raises ConfigError where the model cannot be cut into `size` parts, and what keeps a rank from loading its
    own. Once a rank fails, or no rank gets on for `team.SILENCE_S`, every call raises EngineError, or the
    rank's own error, that names it and what it did.
    """

    def __init__(
        self, weights: ModelWeights, *, model: str, size: int, device: str = "cuda", draw_on: str = "cpu",
        **settings: Any,
    ) -> None:  # fmt: skip
        shard_spec(weights.spec, size)
        self._whole_spec = weights.spec
        if device == "cpu":
            interpret.prepare()
        report = settings.pop("progress", None) or (lambda what, done, total: None)
        self._team = team = Team(size)
        self._group: RankGroup | None = None
        try:
            with team.watch():
                for rank in range(1, size):
                    where = device_of(device, rank)
                    team.tell(ms.Start(model, rank, size, team.store, where, draw_on, settings), rank)
                team.flush()
                team.enter("it waits for the others")
                team.await_phase(ms.JOINING)
                team.enter(ms.JOINING)
                where = device_of(device, 0)
                if where != "cpu":
                    torch.cuda.set_device(where)
                ranks = self._group = team.run(lambda: _join(team.store, size, where))
                team.on_failure = ranks.abort
                team.enter(ms.BUILDING)

                def progress(what: str, done: int, total: int) -> None:
                    team.enter(f"{ms.BUILDING}, {what}", done, total)
                    report(what, done, total)

                own = ShardedWeights(weights, Shard(0, size))
                super().__init__(own, ranks=ranks, device=where, progress=progress, **settings)
                team.enter(ms.FOLLOWING)
                team.started()
        except BaseException:
            self._leave()
            raise

    @property
    def spec(self) -> ModelSpec:
        return self._whole_spec

    def adapter_pages(self, weights: AdapterWeights) -> int:
        self._team.check()
        return super().adapter_pages(weights)

    def forward(self, plan: StepPlan, adapters: Mapping[str, AdapterWeights]) -> torch.Tensor:
        with self._team.watch():
            logits = super().forward(plan, adapters)
            self._wait(None)
        return logits

    def launch(
        self,
        plan: StepPlan,
        adapters: Mapping[str, AdapterWeights],
        rows: SequenceOf[int],
        states: SequenceOf[SamplingState],
    ) -> CudaLaunch:
        with self._team.watch():
            launched = super().launch(plan, adapters, rows, states)
        return _WatchedLaunch(launched, self)

    def describe(self) -> dict[str, str]:
        size = self._ranks.size
        return super().describe() | {
            "ranks": f"{size}, each with 1/{size} of the layers' weights, heads, adapters and pages"
        }

    def close(self) -> None:
        if self._team.failure is None:
            super().close()
        self._leave()

    def _leave(self) -> None:
        """End the other ranks, then what is shared with them. Graphs go before what they send over."""
        self._graphs = self._mixed_graphs = None
        self._team.stop()
        if self._group is not None:
            self._group.close()
        self._team.close()

    def _wait(self, event: torch.cuda.Event | None) -> None:
        """Wait for an event, None for all that was launched, or for the failure of a rank."""
        if not self._is_cuda:
            return
        if event is None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        # A plain wait would never end if a rank is gone.
        self._team.wait(event.query, "a step that all take part in does not end on rank 0")

    def _make_adapters(self, rows: ModelSpec, dtype: torch.dtype) -> CudaAdapters:
        return _LeadingAdapters(self, rows, dtype)

    def _run(
        self,
        plan: StepPlan,
        adapters: Mapping[str, AdapterWeights],
        states: SequenceOf[SamplingState] | None = None,
    ) -> tuple[Stage, torch.Tensor]:
        if plan.copies:
            self._team.tell(ms.Copy([(copy.src, copy.dst) for copy in plan.copies]))
        return super()._run(plan, adapters, states)

    def _announce(
        self, stage: Stage, filled: Filled, size: int | None, indices: Int64s, values: Array
    ) -> None:
        is_rescaled = filled.rescale is not None
        step = ms.Step(
            is_decode=stage is self._decode,
            fields=bytearray(stage.fields.raw),
            page_indices=bytearray(indices.astype(np.int64)),
            page_values=bytearray(values.astype(np.int32)),
            num_rows=filled.num_rows,
            digests=list(filled.layout.digests) if is_rescaled else [],
            segments=filled.layout.segments.tolist() if is_rescaled else [],
            graph=None if size is None else filled.variant.value,
            lora=filled.lora,
            attention=list(filled.attention.items()),
        )
        self._team.tell(step)
        self._team.flush()


class _WatchedLaunch(CudaLaunch):
    """A launch whose wait ends when a rank fails."""

    def __init__(self, launch: CudaLaunch, executor: ParallelExecutor) -> None:
        super().__init__(launch._host, launch._event)
        self._executor = executor

    def sampled(self) -> Sampled:
        if self._event is not None:
            self._executor._wait(self._event)
        return super().sampled()


class _LeadingAdapters(CudaAdapters):
    """Rank 0's part of adapters; the other ranks are given theirs and told what becomes of them."""

    def __init__(self, executor: ParallelExecutor, rows: ModelSpec, dtype: torch.dtype) -> None:
        super().__init__(rows, executor.memory.arena, dtype)
        self._executor, self._team = executor, executor._team

    def load(self, weights: AdapterWeights, pages: SequenceOf[int]) -> None:
        super().load(weights, pages)
        self._team.tell(ms.Load(weights.digest, list(pages)))

    def place(
        self, digests: SequenceOf[str], resident: Mapping[str, SequenceOf[int]]
    ) -> np.ndarray[Any, np.dtype[np.int32]]:
        held = [self._adapters.get(digest) for digest in digests]
        is_news = any(adapter is None or not adapter.is_placed for adapter in held)
        indices = super().place(digests, resident)
        if is_news:
            pages = {digest: list(resident.get(digest, ())) for digest in digests}
            self._team.tell(ms.Place(list(digests), pages))
        return indices

    def _know(self, weights: AdapterWeights) -> Any:
        if weights.digest in self._adapters:
            return super()._know(weights)
        size = self._team.size
        own, scales = shard_adapter(weights, Shard(0, size))
        known = super()._know(own)
        self._executor._keep_scales(weights.digest, scales)
        for rank in range(1, size):
            self._team.tell(_as_message(*shard_adapter(weights, Shard(rank, size)), self._dtype), rank)
        self._team.flush()
        return known

    def pack(self, weights: AdapterWeights) -> AdapterWeights:
        # What rank 0 loads is its part of the whole, which stays as it is.
        self.prepare(weights)
        return weights

    def _part(self, weights: AdapterWeights) -> AdapterWeights:
        return shard_adapter(weights, Shard(0, self._team.size))[0]


def _join(store: str, size: int, device: str) -> RankGroup:
    """Rank 0's part of a `join`, in a thread that has its own current device."""
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    return join(store, 0, size, where)


def device_of(first: str, rank: int) -> str:
    """The device of a rank: "cpu" for all, or the GPUs from rank 0's on."""
    if first == "cpu":
        return first
    return f"cuda:{int(first.partition(':')[2] or 0) + rank}"


def _as_message(weights: AdapterWeights, scales: SumScales, dtype: torch.dtype) -> ms.Adapter:
    def held(values: torch.Tensor | None, kind: torch.dtype = dtype) -> bytearray | None:
        if values is None:
            return None
        return bytearray(values.to(kind).contiguous().view(-1).view(torch.uint8).numpy())

    layers = []
    for deltas, scaled in zip(weights.layers, scales, strict=True):
        layer = {}
        for module, delta in deltas.items():
            scale = scaled.get(module)
            layer[module] = ms.Rows(
                delta.rank, held(delta.a) or bytearray(), held(delta.b) or bytearray(), held(delta.gain),
                held(delta.bias), held(None if scale is None else scale.gain, torch.float32),
                held(None if scale is None else scale.bias, torch.float32),
            )  # fmt: skip
        layers.append(layer)
    return ms.Adapter(weights.digest, layers)


__all__ = ["ParallelExecutor", "ShardedExecutor", "device_of"]
