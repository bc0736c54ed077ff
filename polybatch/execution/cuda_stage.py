"""A kind of step on the GPU, decode or mixed: its arrays, how a plan fills them, and the layers' operations.

Two stages share weights, workspace and scratch. The decode stage has room for one row per sequence, so its
arrays are small and quick to send, and it is what graphs are captured of; the mixed one has room for a whole
prefill budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch

from polybatch.config import ModelSpec
from polybatch.execution.cuda_adapters import CudaAdapters
from polybatch.execution.cuda_graphs import Variant
from polybatch.execution.cuda_model import FUSED, DeviceWeights, with_spare
from polybatch.execution.cuda_step import Layout, PageTable, fill_tokens, token_fields
from polybatch.execution.ranks import COLUMN_PARALLEL, Ranks
from polybatch.execution.step_fields import StepFields
from polybatch.execution.vocabulary import Hosts, patch_embeddings
from polybatch.kernels import sample
from polybatch.kernels.activation.cuda import silu_mul
from polybatch.kernels.embedding.cuda import embedding
from polybatch.kernels.lora import carried as lora_carried
from polybatch.kernels.lora import work as lora_work
from polybatch.kernels.lora.cuda import CudaLora
from polybatch.kernels.lora.cuda_carried import Carrier
from polybatch.kernels.lora.cuda_fused import FusedLora
from polybatch.kernels.norm.cuda import rms_norm
from polybatch.kernels.ragged_attention import work as attention_work
from polybatch.kernels.ragged_attention.cuda import Scratch, make_scratch, ragged_attention
from polybatch.kernels.ragged_attention.work import Heads, Tiles, Work
from polybatch.kernels.write_kv.cuda import write_kv
from polybatch.request import Sequence

GROUP_OF = {name: index for index, name in enumerate(FUSED)}
"""Index of each fused product's adapters among the groups of `lora`."""

MIN_SHARED_TOKENS, MIN_SHARERS = 128, 3
"""A prefix so long, read by so many sequences of a step, is read once for all of them."""

Rescale = Callable[[int, str, torch.Tensor], None]
"""Layer, fused product, its sum over ranks, changed in place: what adapters do to sums over ranks."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What the stages of one executor have in common."""

    spec: ModelSpec
    page_size: int
    device: torch.device
    num_sms: int
    heads: Heads
    tiles: Tiles
    weights: DeviceWeights
    table: PageTable
    rope: torch.Tensor
    pages: SequenceOf[torch.Tensor]
    """Per layer, [num_pages, page_bytes / itemsize] in the pool's dtype."""
    kv: SequenceOf[torch.Tensor]
    """Per layer, [num_pages, 2, KH, page_size, D]."""
    adapters: CudaAdapters
    lora: CudaLora
    carrier: Carrier | None
    """None where weights have no spare columns."""
    max_h: int
    sampled: torch.Tensor
    """[max_seqs] int32, tokens of the launch before."""
    ranks: Ranks

    @property
    def can_fuse(self) -> bool:
        """Whether adapters may be added where a product is read next: nothing comes in between."""
        return self.ranks.size == 1 and all(set(held.biases) <= {"qkv"} for held in self.weights.layers)


@dataclass(slots=True)
class Filled:
    """A plan in a stage's arrays.

    attention: per window of the model, what its plan came to. lora: what to launch for adapters, None for
    nothing. carried: digest and template of the adapter that goes with the base model's products. hosts: of
    the step's adapters, those whose vocabulary layers differ.
    """

    layout: Layout
    num_rows: int
    attention: dict[int | None, Work] = field(default_factory=dict)
    lora: lora_work.LoraPlan | None = None
    carried: tuple[str, lora_work.Int32Array] | None = None
    hosts: Hosts = ()
    rescale: Rescale | None = None

    @property
    def has_wide(self) -> bool:
        return any(work.has_wide for work in self.attention.values())

    @property
    def changes_vocabulary(self) -> bool:
        return any(host is not None for host in self.hosts)

    @property
    def variant(self) -> Variant:
        """What the graph must launch; those of mixed steps always launch wide items."""
        is_wide = self.has_wide or not self.layout.is_decode
        shared = Variant.SHARED if is_wide else Variant.PLAIN
        if self.carried is not None:
            return shared | Variant.CARRIED
        return shared if self.lora is None else shared | Variant.ADAPTED


class Stage:
    """Arrays for steps of at most max_tokens tokens, max_seqs chunks and max_logits rows of logits.

    wide: whether adapters' wide tiles may be planned; graphs of decode steps launch none.
    can_fuse: as of what is shared.
    """

    def __init__(
        self, shared: Shared, max_tokens: int, max_seqs: int, max_logits: int, *, wide: bool
    ) -> None:
        self.shared = shared
        self._wide, self.can_fuse = wide, shared.can_fuse
        spec = shared.spec
        self.windows = sorted({spec.window(i) for i in range(spec.num_layers)}, key=lambda w: w or 0)
        self.limits = self.limits_for(max_tokens, max_seqs)
        self._lora_limits = lora_work.LoraLimits(max_tokens, max_seqs, shared.max_h)
        fields = token_fields(max_tokens, max_logits) | sample.arrays(max_logits)
        fields |= lora_work.arrays(self._lora_limits) | lora_carried.arrays()
        for window in self.windows:
            arrays = attention_work.arrays(self.limits)
            fields |= {_named(name, window): value for name, value in arrays.items()}
        self.fields = StepFields(fields, shared.device)
        self.scratch = make_scratch(shared.heads, self.limits, shared.device)

    def limits_for(self, max_tokens: int, max_seqs: int) -> attention_work.Limits:
        """Attention's limits for steps up to this size."""
        s = self.shared
        return attention_work.make_limits(
            s.heads, s.tiles, max_tokens=max_tokens, max_seqs=max_seqs, num_sms=s.num_sms,
            max_group_tokens=min(max_tokens, max_seqs),
        )  # fmt: skip

    def fill(
        self,
        layout: Layout,
        resident: Mapping[str, SequenceOf[int]],
        sampled_at: Mapping[Sequence, int],
        num_rows: int,
        graph: lora_work.LoraPlan | None = None,
    ) -> Filled:
        """Write a laid-out plan into the arrays of the next `send`, for a step of num_rows rows.

        graph: what the graph of a mixed step that is to run it launches for adapters.
        Raises EngineError where it exceeds a limit.
        """
        shared, views = self.shared, self.fields.open()
        filled = Filled(layout, num_rows)
        fill_tokens(views, layout, shared.table, shared.page_size, sampled_at, num_rows)
        groups = self._groups(layout)
        for window in self.windows:
            filled.attention[window] = attention_work.fill(
                {name: views[_named(name, window)] for name in attention_work.arrays(self.limits)},
                shared.heads, shared.tiles, num_sms=shared.num_sms, max_partials=self.limits.max_partials,
                first_tokens=layout.first_tokens, num_new=layout.num_new, kv_lens=layout.kv_lens,
                page_rows=layout.page_rows, window=window,
                groups=groups if window is None else (),
            )  # fmt: skip
        if len(layout.segments):
            indices = shared.adapters.place(layout.digests, resident)
            segments = layout.segments.copy()
            segments[:, 2] = indices[segments[:, 2]]
            templates = shared.adapters.templates
            if self._carries(layout):
                first, last, index = segments[0].tolist()
                filled.carried = layout.digests[0], templates[index]
                lora_carried.fill(views, first, last, templates[index])
            else:
                filled.lora = lora_work.fill(
                    views, segments, templates, shared.lora.shapes, shared.max_h,
                    num_rows=num_rows, wide=self._wide, graph=graph, is_fused=self.can_fuse,
                )  # fmt: skip
        else:
            views["lora_bounds"][:1] = 0
        return filled

    def _carries(self, layout: Layout) -> bool:
        """Whether the step has one adapter alone, in one run of rows, and it pays to carry it."""
        if self.shared.carrier is None or len(layout.segments) != 1:
            return False
        num_own = int(layout.segments[0, 1] - layout.segments[0, 0])
        return lora_carried.pays(layout.num_tokens, num_own) and self.shared.adapters.can_carry(
            layout.digests[0]
        )

    def _groups(self, layout: Layout) -> list[attention_work.PrefixGroup]:
        if len(layout.chunks) < MIN_SHARERS or None not in self.windows:
            return []
        shared = self.shared
        full = (layout.kv_lens - layout.num_new) // shared.page_size
        if int((full * shared.page_size >= MIN_SHARED_TOKENS).sum()) < MIN_SHARERS:
            return []
        pages = shared.table.host[layout.page_rows, : int(full.max())]
        found = attention_work.find_prefix_groups(
            pages, full, page_size=shared.page_size, min_tokens=MIN_SHARED_TOKENS, min_members=MIN_SHARERS
        )
        # Rows of what was gathered -> rows of the page table.
        return [
            attention_work.PrefixGroup(int(layout.page_rows[g.page_row]), g.num_tokens, g.members)
            for g in found
        ]


class StageOperations:
    """A step's operations over a stage's arrays; see `StepOperations`.

    lora: what to launch for adapters, None for nothing. carries: whether the carrier holds the step's only
    one, which is in the products then. works: per window, which kinds of item attention has, None in graphs:
    any within limits.
    """

    def __init__(
        self,
        stage: Stage,
        num_rows: int,
        *,
        lora: lora_work.LoraPlan | None,
        carries: bool = False,
        works: Mapping[int | None, Work] | None = None,
        limits: attention_work.Limits | None = None,
        scratch: Scratch | None = None,
        has_wide: bool = True,
        patched: Filled | None = None,
        rescale: Rescale | None = None,
    ) -> None:
        self._stage, self._shared = stage, stage.shared
        self._num_rows = num_rows
        self._lora = lora
        self._carrier = self._shared.carrier if carries else None
        # Graphs are for adapters of any rank, whichever is carried now.
        self._silu_leaves_h = (
            self._carrier is not None and works is not None and self._carrier.takes_silu(num_rows)
        )
        self._works = works
        self._limits = limits or stage.limits
        self._scratch = scratch or stage.scratch
        self._has_wide = has_wide
        self._patched = patched
        self._rescale = rescale
        self._fused: FusedLora | None = None
        if lora is not None and lora.is_fusable and stage.can_fuse:
            self._fused = FusedLora(
                self._shared.lora, self._shared.adapters.words, stage.fields.on, lora, num_rows
            )
        self._exchange = None if self._shared.ranks.size == 1 else self._shared.ranks.reduce
        on = stage.fields.on
        self._positions, self._slots = on["positions"][:num_rows], on["slots"][:num_rows]
        self._attention = {
            window: {name: on[_named(name, window)] for name in attention_work.arrays(stage.limits)}
            for window in stage.windows
        }

    def embed(self, out: torch.Tensor) -> None:
        on, shared = self._stage.fields.on, self._shared
        if shared.ranks.rank:
            shared.ranks.broadcast(out)
            return
        ids, sources = on["token_ids"][: self._num_rows], on["sources"][: self._num_rows]
        embedding(ids, sources, shared.sampled, shared.weights.embedding, out=out)
        if self._patched is not None:
            known = torch.where(sources >= 0, shared.sampled[sources.clamp(min=0).long()], ids)
            patch_embeddings(out, known.long(), self._patched.layout.segments.tolist(), self._patched.hosts)
        shared.ranks.broadcast(out)

    def attend(self, layer: int, qkv: torch.Tensor, out: torch.Tensor) -> None:
        shared, spec = self._shared, self._shared.spec
        held = shared.weights.layers[layer]
        given = (qkv, self._positions, self._slots, shared.rope, shared.kv[layer])
        bias, eps = held.biases.get("qkv"), spec.rms_norm_eps
        if self._fused is None:
            q = write_kv(*given, bias=bias, q_norm=held.q_norm, k_norm=held.k_norm, eps=eps)
        else:
            q = self._fused.write_kv(
                layer, self._rows(layer), *given, bias=bias, q_norm=held.q_norm, k_norm=held.k_norm, eps=eps
            )
        window = spec.window(layer)
        work = None if self._works is None else self._works[window]
        ragged_attention(
            q, out, shared.pages[layer], shared.table.on, self._positions, self._attention[window],
            self._scratch, shared.heads, shared.tiles, scale=spec.head_dim**-0.5, page_size=shared.page_size,
            window=window, max_narrow=self._limits.max_narrow if work is None else work.num_narrow,
            max_wide=self._limits.max_wide * self._has_wide if work is None else work.num_wide,
            is_dependent=q.is_cuda, is_decode=self._stage.limits.is_decode, num_sms=shared.num_sms,
        )  # fmt: skip

    def product(self, layer: int, name: str, x: torch.Tensor, out: torch.Tensor) -> None:
        shared, ranks = self._shared, self._shared.ranks
        linear = shared.weights.layers[layer].products[name]
        if self._carrier is not None:
            x = with_spare(x, name)
            if name != "down" or not self._silu_leaves_h:
                self._carrier.shrink(GROUP_OF[name], layer, x, self._stage.fields.on["lora_carried"])
        if self._fused is not None and self._lora is not None:
            shared.lora.shrink_beside(
                lambda: linear.forward(x, out), GROUP_OF[name], layer, x, self._rows(layer),
                shared.adapters.words, self._stage.fields.on, self._lora,
            )  # fmt: skip
            return
        linear.forward(x, out)
        if self._lora is not None:
            rows = self._rows(layer)
            words, arrays = shared.adapters.words, self._stage.fields.on
            own_x, own_out = ranks.adapter_columns(name, x, out)
            shared.lora(
                GROUP_OF[name], layer, own_x, own_out, rows, words, arrays, self._lora, self._exchange
            )
        if ranks.size > 1 and name not in COLUMN_PARALLEL:
            ranks.reduce(out)
            if self._rescale is not None:
                self._rescale(layer, name, out)

    def activate(self, layer: int, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        if self._carrier is not None and self._silu_leaves_h:
            self._carrier.silu_mul(
                layer, gate_up, with_spare(out, "down"), self._stage.fields.on["lora_carried"]
            )
        elif self._fused is None:
            silu_mul(gate_up, out=out)
        else:
            self._fused.silu_mul(layer, self._rows(layer), gate_up, out)

    def add_norm(
        self,
        layer: int,
        name: str,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> None:
        eps = self._shared.spec.rms_norm_eps
        if self._fused is None:
            rms_norm(x, weight, eps, residual=residual, rows=rows, out=out)
        else:
            self._fused.rms_norm(
                GROUP_OF[name], layer, self._rows(layer), x, weight, eps,
                residual=residual, out=out, rows=rows,
            )  # fmt: skip

    def _rows(self, layer: int) -> torch.Tensor:
        """The layer's pool, flat."""
        return self._shared.pages[layer].reshape(-1)


def _named(name: str, window: int | None) -> str:
    """The array's name among the fields; models may have layers of several windows."""
    return name if window is None else f"{name}@{window}"
