"""The executor for CUDA: Triton kernels around cuBLAS products, steps as captured graphs.

A step replays the graph of the next larger number of rows; only large mixed steps, whose kernels take
longer than their launches, are launched kernel by kernel. `launch` leaves the sampled tokens on the device,
where the next step's embedding finds them, and copies them to pinned memory for whoever asks later.
Everything is on one stream, in the order of the calls, but for adapter loads. After the constructor no step
allocates device memory, except for adapters that change the vocabulary layers, whose tables are brought
over when used, and for rows that the host samples.

On `device="cpu"` the same code runs in Triton's interpreter, for tests.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import partial

import torch

from polybatch.adapters.weights import AdapterWeights
from polybatch.config import CUDA_DTYPES, ModelSpec, PoolSpec
from polybatch.errors import ConfigError, EngineError
from polybatch.execution.cuda_adapters import CudaAdapters
from polybatch.execution.cuda_graphs import (
    MAX_MIXED_ROWS,
    GraphLadder,
    Variant,
    ladder,
    mixed_ladder,
    variants,
)
from polybatch.execution.cuda_model import SPARE_OF, DeviceWeights, Workspace, run_head, run_layers
from polybatch.execution.cuda_stage import Filled, Rescale, Shared, Stage, StageOperations
from polybatch.execution.cuda_step import Array, Int64s, PageTable, lay_out
from polybatch.execution.page_memory import TORCH_DTYPES, PageMemory, page_bytes
from polybatch.execution.ranks import ALONE, MIN_PART_COLUMNS, Ranks
from polybatch.execution.sharding import row_spec
from polybatch.execution.vocabulary import hosts_of, patch_logits
from polybatch.kernels import sample
from polybatch.kernels.linear.cuda import LinearWorkspace, pack
from polybatch.kernels.lora import carried
from polybatch.kernels.lora.cuda import CudaLora
from polybatch.kernels.lora.cuda_carried import Carrier
from polybatch.kernels.lora.work import (
    GRAPH_PLAN,
    LoraPlan,
    common_mixed_plans,
    group_shapes,
    mixed_graph_plan,
)
from polybatch.kernels.ragged_attention.cuda import choose_tiles
from polybatch.kernels.ragged_attention.work import Heads, Work
from polybatch.kernels.rehearsal import rehearsal
from polybatch.kernels.sample.cuda import DeviceSampler, SampleParams
from polybatch.kernels.write_kv.cuda import rope_table
from polybatch.models.rope import rope_frequencies
from polybatch.models.weights import ModelWeights
from polybatch.request import Sequence
from polybatch.sampling.sampler import Sampled
from polybatch.sampling.state import SamplingState
from polybatch.scheduling.plan import StepPlan

PAGE_TOKENS = 16
RING = 3
"""Launches whose tokens may still lie in pinned memory."""

MAX_H = 1 << 22
"""Elements of the buffer between the two halves of adapters, 16 MiB: a step of more takes several rounds."""

INTERPRETED_SMS = 4
"""What the interpreter plans for, where no device says how many multiprocessors it has."""


class CudaExecutor:
    """Runs ragged steps on one GPU; an `AheadExecutor`.

    dtype: of activations, keys and values, adapter rows, and of weights that are not quantised.
    quantization: of the layers' linear weights: None, "int4", "int4-channel" or "fp8". A checkpoint that is
        quantised in the same kind is taken as it is stored where the kernels can (`stored_product`).
    max_num_tokens, max_num_seqs: of a step; max_num_logits: rows of logits, max_num_seqs by default, more
        where prompts are scored. max_model_len: tokens of a sequence.
    graphs: capture steps. progress: told what start-up does, how much of it is done, of how much.
    ranks: the GPUs of which this is one, where the weights are only its part; see `parallel`.
    Raises ConfigError for a setting that cannot work.
    """

    batch_invariant = False
    """Matrix products and split contexts choose their order of summation by the batch."""

    def __init__(
        self,
        weights: ModelWeights,
        *,
        dtype: str = "bfloat16",
        quantization: str | None = None,
        num_pages: int,
        page_size: int = PAGE_TOKENS,
        max_num_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        max_num_logits: int | None = None,
        device: str = "cuda",
        graphs: bool = True,
        threads: int | None = None,
        ranks: Ranks = ALONE,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        if dtype not in CUDA_DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(CUDA_DTYPES)}")
        if page_size != PAGE_TOKENS:
            raise ConfigError(f"page_size is {page_size}; the GPU's kernels take {PAGE_TOKENS}")
        if threads is not None and device == "cpu":
            torch.set_num_threads(threads)
        report = progress or (lambda what, done, total: None)
        spec, kind = weights.spec, TORCH_DTYPES[dtype]
        self._spec, self._dtype, self._quantization = spec, dtype, quantization
        self._device = where = torch.device(device)
        self._is_cuda = where.type == "cuda"
        self._limits = (max_num_tokens, max_num_seqs, max_model_len)
        self._max_logits = max(max_num_seqs, max_num_logits or 0)
        self._ranks = ranks
        rows = row_spec(spec, ranks.size)
        self._pool = PoolSpec(num_pages, page_size, page_bytes(rows, page_size, dtype), spec.num_layers)
        began = time.perf_counter()
        linear_space = LinearWorkspace(where, kind, max_num_tokens)
        # Packed weights have no spare columns; of cut ones each rank would need h of all.
        has_spare = quantization is None and ranks.size == 1
        self._weights = DeviceWeights(
            weights, kind, where,
            lambda name, weight: pack(weight, quantization, linear_space, SPARE_OF[name] * has_spare),
            lambda done, total: report("weights", done, total), quantization,
        )  # fmt: skip
        if self._is_cuda:
            torch.cuda.synchronize(where)
        loaded = time.perf_counter()
        self.memory = PageMemory(spec, self._pool, dtype, device)
        # Logits are where the sampler is.
        own_logits = self._max_logits if ranks.rank == 0 else 0
        self._space = Workspace(spec, max_num_tokens, own_logits, kind, where, has_spare)
        self._table = PageTable(max_num_seqs, -(-max_model_len // page_size) + 1, where)
        self._adapters = self._make_adapters(rows, kind)
        num_sms = (
            torch.cuda.get_device_properties(where).multi_processor_count
            if self._is_cuda
            else INTERPRETED_SMS
        )
        heads = Heads(spec.num_heads, spec.num_kv_heads, spec.head_dim)
        shapes = group_shapes(rows.linear_shapes, MIN_PART_COLUMNS if ranks.size > 1 else 0)
        lora = CudaLora(shapes, kind, where, MAX_H, num_programs=None if self._is_cuda else INTERPRETED_SMS)
        inv_freq, rope_scaling = rope_frequencies(spec.rope, spec.head_dim, spec.max_position)
        layers = range(spec.num_layers)
        pages = self.memory.arena.view(kind).flatten(1)
        carrier = None
        if has_spare:
            held = self._weights.with_spare_columns()
            carrier = Carrier(held, shapes, pages, self._adapters.words)
        shared = Shared(
            spec=spec, page_size=page_size, device=where, num_sms=num_sms, heads=heads,
            tiles=choose_tiles(heads, kind), weights=self._weights, table=self._table,
            rope=rope_table(inv_freq, rope_scaling, max_model_len + 1).to(where),
            pages=[pages[i].view(num_pages, -1) for i in layers],
            kv=[self.memory.kv(i) for i in layers],
            adapters=self._adapters, lora=lora, carrier=carrier, max_h=MAX_H,
            sampled=torch.zeros(max_num_seqs, dtype=torch.int32, device=where), ranks=ranks,
        )  # fmt: skip
        self._shared = shared
        self._mixed = Stage(shared, max_num_tokens, max_num_seqs, self._max_logits, wide=True)
        self._decode = Stage(shared, max_num_seqs, max_num_seqs, max_num_seqs, wide=False)
        self._sampler = DeviceSampler(max_num_seqs if own_logits else 0, spec.vocab_size, where)
        self._finite = torch.zeros(max_num_seqs, dtype=torch.int32, device=where)
        self._ring = [
            torch.zeros(2, max_num_seqs, dtype=torch.int32, pin_memory=self._is_cuda) for _ in range(RING)
        ]
        self._num_launches = 0
        self._may_truncate = False
        self._sampled_at: dict[Sequence, int] = {}
        # Of decode steps and of mixed ones.
        self._graphs: GraphLadder | None = None
        self._mixed_graphs: GraphLadder | None = None
        self.startup_s = {"weights": loaded - began}
        """Seconds that start-up took, by phase."""
        if self._is_cuda:
            report("kernels", 0, 1)
            self._warm_up()
            torch.cuda.synchronize(where)
        self.startup_s["kernels"] = (compiled := time.perf_counter()) - loaded
        if graphs and self._is_cuda:
            self._graphs = GraphLadder(
                ladder(max_num_seqs), partial(self._variants, is_decode=True), self._run_decode, where,
                lambda done, total: report("graphs", done, total),
            )  # fmt: skip
            sizes = mixed_ladder(max_num_tokens)
            if ranks.size > 1:
                # With exchanges between GPUs inside, each takes some 0.4 s to capture.
                sizes = sizes[::-4][::-1]
            self._mixed_graphs = GraphLadder(
                sizes, partial(self._variants, is_decode=False), self._run_mixed, where,
                lambda done, total: report("graphs of mixed steps", done, total),
            )  # fmt: skip
            if ranks.size == 1:
                self._mixed_graphs.drop_dominated()
        self.startup_s["graphs"] = time.perf_counter() - compiled

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def pool(self) -> PoolSpec:
        return self._pool

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """Numbers of rows that decode steps are padded to, ascending; empty where nothing is captured."""
        return () if self._graphs is None else tuple(self._graphs.sizes)

    @property
    def mixed_graph_sizes(self) -> tuple[int, ...]:
        """As `graph_sizes`, of mixed steps; larger ones are not padded."""
        return () if self._mixed_graphs is None else tuple(self._mixed_graphs.sizes)

    @property
    def arena(self) -> torch.Tensor:
        """The pool's memory, [num_layers, num_pages, page_bytes] uint8."""
        return self.memory.arena

    def adapter_pages(self, weights: AdapterWeights) -> int:
        return self._adapters.pages_needed(weights)

    def pack_adapter(self, weights: AdapterWeights) -> AdapterWeights:
        return self._adapters.pack(weights)

    @torch.no_grad()
    def forward(self, plan: StepPlan, adapters: Mapping[str, AdapterWeights]) -> torch.Tensor:
        """Carry out a plan; see `Executor.forward`. Raises EngineError where it breaks a limit."""
        return self._run(plan, adapters)[1]

    def can_sample(self, state: SamplingState) -> bool:
        return sample.is_device_samplable(state)

    @torch.no_grad()
    def launch(
        self,
        plan: StepPlan,
        adapters: Mapping[str, AdapterWeights],
        rows: SequenceOf[int],
        states: SequenceOf[SamplingState],
    ) -> CudaLaunch:
        """Start a step; see `AheadExecutor.launch`."""
        stage, logits = self._run(plan, adapters, states)
        count = len(states)
        if count != len(logits):
            raise EngineError(f"a launch samples {count} of {len(logits)} rows of logits; it must be all")
        sampled, finite = self._shared.sampled, self._finite
        if count:
            on = stage.fields.on
            params = SampleParams(*(on[name] for name in sample.arrays(0)))
            self._sampler.sample(logits, params, sampled, finite, may_truncate=self._may_truncate)
        host = self._ring[self._num_launches % RING]
        self._num_launches += 1
        host[0, :count].copy_(sampled[:count], non_blocking=True)
        host[1, :count].copy_(finite[:count], non_blocking=True)
        self._sampled_at = {state.seq: row for row, state in enumerate(states)}
        event = None
        if self._is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return CudaLaunch(host[:, :count], event)

    def _run(
        self,
        plan: StepPlan,
        adapters: Mapping[str, AdapterWeights],
        states: SequenceOf[SamplingState] | None = None,
    ) -> tuple[Stage, torch.Tensor]:
        """Loads, copies and the layers; returns the stage that the step ran on, and its logits."""
        for load in plan.loads:
            if load.adapter.digest not in adapters:
                raise EngineError(f"the plan loads adapter {load.adapter.name!r} without host weights")
            self._adapters.load(adapters[load.adapter.digest], load.pages)
        for copy in plan.copies:
            self.memory.copy_page(copy.src, copy.dst)
        if not plan.chunks:
            return self._mixed, self._space.logits[:0]
        layout = lay_out(plan, self._table)
        self._check(layout.num_tokens, len(layout.chunks), int(layout.kv_lens.max()), len(layout.logit_rows))
        stage, graphs, graph_plan = self._mixed, self._mixed_graphs, None
        if layout.is_decode:
            stage, graphs = self._decode, self._graphs
        size = None if graphs is None else graphs.size_for(layout.num_tokens)
        if size is not None:
            graph_plan = self._graph_plan(size, layout.is_decode)
        filled = stage.fill(layout, plan.resident, self._sampled_at, size or layout.num_tokens, graph_plan)
        filled.hosts = hosts_of(layout.digests, adapters)
        filled.rescale = self._rescale(layout.digests, layout.segments.tolist())
        if graph_plan is not None and not self._fits_graph(filled, graph_plan):
            size = None
        if states is not None:
            positions = [len(state.seq.tokens) for state in states]
            self._may_truncate = sample.fill(stage.fields.host, states, positions, self._spec.vocab_size)
        changes = self._table.changes()
        self._announce(stage, filled, size, *changes)
        stage.fields.send()
        self._table.send(*changes)
        if self._is_cuda:
            self._adapters.wait(layout.digests)
        if filled.carried is not None and self._shared.carrier is not None:
            self._shared.carrier.take(*filled.carried, stage.fields.on["lora_carried"])
        if size is None or graphs is None:
            return stage, self._run_eager(stage, filled)
        graphs.replay(size, filled.variant)
        if layout.is_decode:
            return stage, self._space.logits[: len(layout.logit_rows)]
        return stage, self._head(stage, filled, self._operations(stage, filled))

    def _operations(self, stage: Stage, filled: Filled) -> StageOperations:
        return StageOperations(
            stage, filled.num_rows, lora=filled.lora, carries=filled.carried is not None,
            works=filled.attention, patched=filled if filled.changes_vocabulary else None,
            rescale=filled.rescale,
        )  # fmt: skip

    def _head(self, stage: Stage, filled: Filled, operations: StageOperations) -> torch.Tensor:
        rows = stage.fields.on["logit_rows"][: len(filled.layout.logit_rows)]
        logits = run_head(self._weights, self._space, operations, rows, filled.num_rows)
        if filled.changes_vocabulary:
            last = self._space.last[: len(rows)]
            patch_logits(logits, last, rows, filled.layout.segments.tolist(), filled.hosts)
        return logits

    def _run_eager(self, stage: Stage, filled: Filled) -> torch.Tensor:
        """Launch the layers' kernels one by one."""
        operations = self._operations(stage, filled)
        run_layers(self._weights, self._space, operations, filled.num_rows)
        return self._head(stage, filled, operations)

    def _run_decode(self, num_rows: int, variant: Variant, is_rehearsal: bool) -> None:
        """What the graph of a decode step captures: all of it, over the first rows of the stage's arrays."""
        operations = self._graph_operations(self._decode, num_rows, variant)
        count = num_rows if self._ranks.rank == 0 else 0
        rows = self._decode.fields.on["logit_rows"][:count]
        run_layers(self._weights, self._space, operations, num_rows, self._num_layers(is_rehearsal))
        run_head(self._weights, self._space, operations, rows, num_rows)

    def _run_mixed(self, num_rows: int, variant: Variant, is_rehearsal: bool) -> None:
        """What the graph of a mixed step captures: the layers. How many logits follow differs by step."""
        operations = self._graph_operations(self._mixed, num_rows, variant)
        run_layers(self._weights, self._space, operations, num_rows, self._num_layers(is_rehearsal))

    def _num_layers(self, is_rehearsal: bool) -> int | None:
        return self._weights.num_telling_layers if is_rehearsal else None

    def _graph_operations(self, stage: Stage, num_rows: int, variant: Variant) -> StageOperations:
        plan = self._graph_plan(num_rows, stage is self._decode)
        return StageOperations(
            stage, num_rows, lora=plan if Variant.ADAPTED in variant else None,
            carries=Variant.CARRIED in variant, has_wide=Variant.SHARED in variant,
            limits=stage.limits_for(num_rows, min(num_rows, self._limits[1])),
        )  # fmt: skip

    def _graph_plan(self, num_rows: int, is_decode: bool) -> LoraPlan:
        """What the graph of so many rows launches for adapters."""
        # Parts travel between GPUs.
        plan = GRAPH_PLAN if is_decode else mixed_graph_plan(num_rows, 0 if self._ranks.size == 1 else 1)
        return replace(plan, num_h=(self._ranks.h_capacity(num_rows, MAX_H),))

    @torch.no_grad()
    def _warm_up(self) -> None:
        """Compile what steps launch, so that none of them waits for a compiler."""
        stage, num_rows = self._mixed, min(16, *self._limits[:2])
        stage.fields.open()["slots"][:num_rows] = -1
        stage.fields.send()
        with rehearsal(os.cpu_count() or 1):
            for narrow, wide in ((1, 0), (0, 1), (1, 1)):
                works = {window: Work(narrow, wide, num_partials=0) for window in stage.windows}
                self._rehearse(StageOperations(stage, num_rows, lora=None, works=works), num_rows)
            if self._ranks.size > 1:
                return
            for plan in common_mixed_plans():
                self._rehearse(StageOperations(stage, num_rows, lora=plan, works=works), num_rows)
            self._rehearse_carrier(stage)
            # Of graphs, the smallest and the largest; in between kernels are the same.
            for is_decode, most in ((True, self._limits[1]), (False, min(self._limits[0], MAX_MIXED_ROWS))):
                run = self._run_decode if is_decode else self._run_mixed
                for size in (1, most) if is_decode else (most,):
                    for variant in self._variants(size, is_decode):
                        run(size, variant, True)

    def _rehearse(self, operations: StageOperations, num_rows: int) -> None:
        stage, is_first = self._mixed, self._ranks.rank == 0
        rows = stage.fields.on["logit_rows"][: num_rows if is_first else 0]
        run_layers(self._weights, self._space, operations, num_rows)
        logits = run_head(self._weights, self._space, operations, rows, num_rows)
        if is_first:
            params = SampleParams(*(stage.fields.on[name] for name in sample.arrays(0)))
            self._sampler.sample(logits, params, self._shared.sampled, self._finite)

    def _rehearse_carrier(self, stage: Stage) -> None:
        if self._shared.carrier is None:
            return
        inputs, on = self._space.wide_inputs(), stage.fields.on["lora_carried"]
        self._shared.carrier.rehearse(inputs, self._space.gate_up, on)

    def _variants(self, num_rows: int, is_decode: bool) -> tuple[Variant, ...]:
        """Of the graphs of so many rows."""
        can_carry = self._shared.carrier is not None and num_rows >= carried.MIN_ROWS
        return variants(is_decode=is_decode, can_carry=can_carry)

    def _fits_graph(self, filled: Filled, launched: LoraPlan) -> bool:
        """Whether a graph that launches this for adapters launches all that the step needs."""
        if filled.changes_vocabulary or filled.rescale is not None:
            return False
        if filled.lora is None or self._ranks.size == 1:
            return filled.lora is None or launched.holds(filled.lora)
        return launched.holds(filled.lora) and filled.lora.num_h[0] <= launched.num_h[0]

    # What differs where several GPUs run a step together; see `parallel`.

    def _make_adapters(self, rows: ModelSpec, dtype: torch.dtype) -> CudaAdapters:
        """Adapters of the pool. rows: a spec whose `linear_shapes` are those of adapter rows."""
        return CudaAdapters(rows, self.memory.arena, dtype)

    def _rescale(self, digests: SequenceOf[str], segments: SequenceOf[SequenceOf[int]]) -> Rescale | None:
        """What these adapters do to sums over ranks, None for nothing."""
        return None

    def _announce(
        self, stage: Stage, filled: Filled, size: int | None, indices: Int64s, values: Array
    ) -> None:
        """A step is laid out in the stage's host arrays; nothing of it has been sent.

        size: of the graph to replay. indices, values: what is new in the page table.
        """

    def _check(self, *sizes: int) -> None:
        names = ("max_num_tokens", "max_num_seqs", "max_model_len", "max_num_logits")
        for name, size, limit in zip(names, sizes, (*self._limits, self._max_logits), strict=True):
            if size > limit:
                raise EngineError(f"a step has {size} for {name}, the executor was built for {limit}")

    def release(self, seq: Sequence) -> None:
        self._table.release(seq)

    def describe(self) -> dict[str, str]:
        """Kernel chosen per operation and why."""
        name = torch.cuda.get_device_name(self._device) if self._is_cuda else "Triton's interpreter"
        graphs = "none: every step is launched kernel by kernel"
        if self._graphs is not None:
            sizes, mixed = self.graph_sizes, self.mixed_graph_sizes
            graphs = f"decode steps of {len(sizes)} sizes up to {sizes[-1]} rows"
            if mixed:
                graphs += f", mixed ones of {len(mixed)} up to {mixed[-1]}"
        return {
            "executor": f"Triton kernels and cuBLAS on {name}",
            "linear": f"{self._quantization or self._dtype} weights, {self._dtype} activations",
            "attention": f"{self._dtype} keys and values, pages of {PAGE_TOKENS} tokens, prefixes read once",
            "adapters": f"{self._dtype} rows gathered from pages, any rank",
            "graphs": graphs,
            "weights": f"{self._weights.num_bytes / 2**20:,.0f} MiB",
            "start-up": ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.startup_s.items()),
        }

    def close(self) -> None:
        """Wait for the device and give its memory back."""
        if self._is_cuda:
            torch.cuda.synchronize(self._device)
        self._graphs = self._mixed_graphs = None
        for name in ("_shared", "_mixed", "_decode", "_space", "_weights", "_adapters", "_sampler", "memory"):
            self.__dict__.pop(name, None)
        if self._is_cuda:
            gc.collect()
            torch.cuda.empty_cache()


class CudaLaunch:
    """A step on the device. host: [2, rows] int32, tokens and whether their logits were finite."""

    def __init__(self, host: torch.Tensor, event: torch.cuda.Event | None) -> None:
        self._host, self._event = host, event

    def sampled(self) -> Sampled:
        """Wait for the step. Raises RuntimeError if the device failed."""
        if self._event is not None:
            self._event.synchronize()
        tokens, finite = self._host.tolist()
        errors = {row: "the model's logits are not finite" for row, fine in enumerate(finite) if not fine}
        return Sampled(tokens, errors=errors)
