"""The forward pass of a decoder as a program of compiled operations.

Built once per model: the table names every operation with its buffers, so a step only changes a
handful of counts in the state. There are two tables, with and without adapters; a step whose rows are
all base rows walks the one that has never heard of them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from polybatch.errors import ConfigError
from polybatch.execution.cpu_kernels import KernelShape, compile_kernels
from polybatch.kernels.cpu.emit import LANES, LOG2_E
from polybatch.kernels.cpu.layout import ITEM_BYTES, NUM_LOGITS, NUM_TOKENS, padded
from polybatch.kernels.cpu.memory import Area, aligned_bytes, release_free_memory
from polybatch.kernels.cpu.team import Program
from polybatch.kernels.linear.cpu import (
    ADD,
    H_PTR,
    H_STRIDE,
    NEXT_PANEL_BYTES,
    NEXT_W,
    PANEL_BYTES,
    SILU_MUL,
    STORE,
    W_PTR,
)
from polybatch.kernels.linear.cpu_pack import INTEGER_KINDS, PackedLinear, Weight, pack
from polybatch.kernels.linear.quantize import GROUP
from polybatch.kernels.lora.cpu import H_PTR as SHRINK_H_PTR
from polybatch.kernels.lora.cpu import H_STRIDE as SHRINK_H_STRIDE
from polybatch.models.rope import rope_frequencies
from polybatch.models.weights import LayerWeights, ModelWeights

Operation = tuple[int, list[int]]

TRIM_LAYERS = 8
"""Layers packed between two times that freed memory goes back to the system."""


def bits_of(value: float) -> int:
    """A float32's bits as an integer, for an operation's argument."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


@dataclass(frozen=True, slots=True)
class Precision:
    """dtype: of activations, keys, values and adapter rows. linear, head: kinds of packed weights."""

    dtype: str
    linear: str
    head: str

    @staticmethod
    def of(dtype: str, quantization: str | None) -> Precision:
        if quantization is None:
            return Precision(dtype, dtype, dtype)
        # The vocabulary's matrix decides the last digit of every logit, so 4 bits stop before it.
        return Precision(dtype, quantization, "int8")


@dataclass(frozen=True, slots=True)
class StepAddresses:
    """Addresses of the arrays that change from step to step; the arrays themselves live elsewhere."""

    token_ids: int
    positions: int
    token_adapter: int
    adapter_tables: int
    logit_rows: int
    runs: int
    tiles: int
    segments: int
    page_table: int
    page_table_stride: int
    pages: int
    layer_bytes: int
    page_bytes: int


class Buffers:
    """Activation buffers and constants that operations point to; zeroed, and kept as long as this is."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []

    def rows(self, max_rows: int, width: int, item: int) -> int:
        """Address of zeroed [max_rows, width] of `item` bytes each."""
        return self.tensor(max_rows, width, item).data_ptr()

    def tensor(self, max_rows: int, width: int, item: int) -> torch.Tensor:
        """Zeroed bytes of [max_rows, width] of `item` bytes each, as uint8 [max_rows, width * item]."""
        tensor = aligned_bytes(max_rows * width * item)
        self._kept.append(tensor)
        return tensor.view(max_rows, width * item)

    def constant(self, values: torch.Tensor, width: int | None = None) -> int:
        """Address of float32 values, padded with zeros to `width`."""
        flat = values.detach().float().reshape(-1)
        tensor = aligned_bytes(4 * max(flat.numel(), width or 0))
        tensor.view(torch.float32)[: flat.numel()] = flat
        self._kept.append(tensor)
        return tensor.data_ptr()

    def keep(self, tensor: torch.Tensor) -> None:
        """Hold memory that operations point to."""
        self._kept.append(tensor)

    def table(self, values: np.ndarray[Any, Any]) -> int:
        """Address of an array's values."""
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        self._kept.append(tensor)
        return tensor.data_ptr()


@dataclass(frozen=True, slots=True)
class _PackedLayer:
    """A layer's weights as its operations take them."""

    qkv: PackedLinear
    o: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    input_norm: torch.Tensor
    post_attention_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


@contextlib.contextmanager
def packing_threads(count: int) -> Iterator[Executor]:
    """Threads that dequantise and pack, a layer each, every torch call on the thread that makes it.

    torch's own threads meet at a barrier in every call, thousands of times here: with other work on the
    processors each meeting takes a time slice, and packing took forty times as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # torch counts its threads per calling thread; those that are new take over what was set last.
    workers = ThreadPoolExecutor(count, "polybatch-pack", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield workers
    finally:
        workers.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


class CpuProgram:
    """Packed weights, buffers and the operation tables of one model on the CPU."""

    def __init__(
        self,
        weights: ModelWeights,
        precision: Precision,
        step: StepAddresses,
        max_tokens: int,
        max_logits: int,
        max_model_len: int,
        progress: Callable[[int, int], None] | None = None,
        threads: int = 1,
    ) -> None:
        spec = weights.spec
        self.spec = spec
        self.precision = precision
        self.step = step
        self.buffers = Buffers()
        self.weight_bytes = 0
        self._packed: list[PackedLinear] = []
        self._check()
        self._max_tokens = max_tokens
        self._allocate(max_tokens, max_logits)
        self._compile()
        self._rope(max_model_len)
        self._area = Area()
        with packing_threads(threads) as workers:
            vocabulary = self._keep(self._pack([Weight(weights.lm_head())], self.precision.head))
            plain: list[Operation] = [self._embed(weights, vocabulary)]
            adapted = list(plain)
            layers = workers.map(lambda i: self._pack_layer(weights.layer(i)), range(spec.num_layers))
            for index, layer in enumerate(layers):
                with_adapters, without = self._layer(index, layer)
                plain += without
                adapted += with_adapters
                if index % TRIM_LAYERS == 0:
                    release_free_memory()
                if progress is not None:
                    progress(index + 1, spec.num_layers)
        release_free_memory()
        head = self._head(weights, vocabulary)
        self.plain = Program(plain + head)
        self.adapted = Program(adapted + head)
        for program in (self.plain, self.adapted):
            self._chain_prefetches(program)
        self._h = torch.empty(0, dtype=torch.float32)

    def _check(self) -> None:
        spec, kind = self.spec, self.precision.linear
        if kind == "int4":
            for name, (_, inputs) in spec.linear_shapes.items():
                if inputs % GROUP:
                    raise ConfigError(
                        f"quantization is int4, which needs inputs in groups of {GROUP}; {name} has "
                        f"{inputs}: use int8 or None"
                    )

    def _allocate(self, max_tokens: int, max_logits: int) -> None:
        spec, item = self.spec, ITEM_BYTES[self.precision.dtype]
        self.head_stride = padded(spec.head_dim, LANES)
        self.hidden = padded(spec.hidden_size)
        self.attention_width = padded(spec.num_heads * self.head_stride)
        self.ff_width = padded(padded(spec.intermediate_size, 32))
        self.qkv_width = padded(spec.q_size) + 2 * padded(spec.kv_size)
        self.vocab_width = padded(spec.vocab_size)
        b = self.buffers
        self.x_tensor = b.tensor(max_tokens, self.hidden, 4).view(torch.float32)
        self.x = self.x_tensor.data_ptr()
        self.a = b.rows(max_tokens, self.hidden, item)
        self.qkv = b.rows(max_tokens, self.qkv_width + 2 * LANES, 4)
        self.q = b.rows(max_tokens, self.attention_width, item)
        self.attention = b.rows(max_tokens, self.attention_width, item)
        self.act = b.rows(max_tokens, self.ff_width, item)
        widest = max(self.hidden, self.attention_width, self.ff_width)
        self.int_rows = b.rows(max_tokens, widest, 1)
        self.sums_stride = 4 * (widest // GROUP)
        self.int_scales = b.rows(max_tokens, widest // GROUP, 4)
        self.int_sums = b.rows(max_tokens, widest // GROUP, 4)
        torch_dtype = torch.float32 if self.precision.dtype == "float32" else torch.bfloat16
        self.last_tensor = b.tensor(max_logits, self.hidden, item).view(torch_dtype)
        self.last = self.last_tensor.data_ptr()
        self.logits_tensor = aligned_bytes(max_logits * self.vocab_width * 4).view(torch.float32)
        self.logits_tensor = self.logits_tensor.view(max_logits, self.vocab_width)

    def _compile(self) -> None:
        p = self.precision
        kernels = compile_kernels(KernelShape.of(self.spec, p.dtype, p.linear, p.head))
        self._norm, self._write_kv, self._attend = kernels.norm, kernels.write_kv, kernels.attend
        self._kernels, self._shrink = kernels, kernels.shrink
        self._linear, self._quantizers = kernels.linear, kernels.quantizers

    def _rope(self, max_model_len: int) -> None:
        spec = self.spec
        inv_freq, scaling = rope_frequencies(spec.rope, spec.head_dim)
        angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * torch.as_tensor(inv_freq).float()
        table = torch.stack((angles.cos(), angles.sin()), dim=1) * scaling
        self.cos_sin = self.buffers.constant(table)

    # operations

    def _embed(self, weights: ModelWeights, vocabulary: PackedLinear) -> Operation:
        """Rows of the packed head where it is the same matrix in the same precision, else of a table."""
        dtype = self.precision.dtype
        if self.spec.tie_embeddings and self._kernels.embed_packed is not None:
            return self._kernels.embed_packed, [
                vocabulary.data.data_ptr(), vocabulary.panel_bytes, self.x, self.hidden * 4,
                vocabulary.in_size, NUM_TOKENS, self.step.token_ids]  # fmt: skip
        source = weights.embedding()
        item = ITEM_BYTES[dtype]
        table = aligned_bytes(self.spec.vocab_size * self.hidden * item)
        target = table.view(torch.float32 if dtype == "float32" else torch.bfloat16)
        target.view(-1, self.hidden)[:, : self.spec.hidden_size] = source
        self.buffers.keep(table)
        self.weight_bytes += table.numel()
        args = [table.data_ptr(), self.hidden * item, self.x, self.hidden * 4, self.hidden, NUM_TOKENS,
                self.step.token_ids]  # fmt: skip
        return self._kernels.embed, args

    def _norm_op(self, weight: torch.Tensor, dst: int, rows_index: int, rows: int) -> Operation:
        item = ITEM_BYTES[self.precision.dtype]
        args = [self.x, self.hidden * 4, dst, self.hidden * item, self.hidden, rows_index, rows,
                self.buffers.constant(weight, self.hidden), 0, 0, 0, self.spec.hidden_size,
                bits_of(self.spec.rms_norm_eps)]  # fmt: skip
        return self._norm, args

    def _linear_ops(
        self, packed: PackedLinear, end: int, src: int, width: int, out: int, out_stride: int,
        rows_index: int, layer: int, has_adapters: bool,
    ) -> list[Operation]:  # fmt: skip
        """Quantise the input where the weights are integers, then multiply."""
        item = ITEM_BYTES[self.precision.dtype]
        ops: list[Operation] = []
        a, a_stride = src, width * item
        if packed.kind in INTEGER_KINDS:
            a, a_stride = self.int_rows, width
            ops.append((self._quantizers[packed.kind], [
                src, width * item, a, a_stride, width, rows_index, 0, 0, self.int_scales, self.int_sums,
                self.sums_stride]))  # fmt: skip
        steps = (
            packed.in_size // GROUP
            if packed.kind in INTEGER_KINDS
            else packed.in_size * ITEM_BYTES[packed.kind] // 4
        )
        ops.append((self._linear[packed.kind, end], [
            a, a_stride, self.int_scales, self.int_sums, self.sums_stride, packed.data.data_ptr(),
            packed.panel_bytes, packed.num_panels, steps,
            packed.scales.data_ptr() if packed.scales is not None else 0,
            self.buffers.table(packed.records), out, out_stride, rows_index,
            self.step.token_adapter if has_adapters else 0, self.step.adapter_tables, layer,
            0, 0]))  # fmt: skip
        return ops

    def _pack(self, weights: list[Weight], kind: str, interleave: bool = False) -> PackedLinear:
        return pack(weights, kind, interleave, self._area.bytes)

    def _keep(self, packed: PackedLinear) -> PackedLinear:
        self.weight_bytes += packed.nbytes
        self._packed.append(packed)
        return packed

    def _pack_layer(self, w: LayerWeights) -> _PackedLayer:
        """Runs in several threads at once."""
        kind = self.precision.linear
        return _PackedLayer(
            qkv=self._pack(
                [Weight(w.q, 0, w.q_bias), Weight(w.k, 1, w.k_bias), Weight(w.v, 2, w.v_bias)], kind
            ),
            o=self._pack([Weight(self._spread_heads(w.o), 3, w.o_bias)], kind),
            gate_up=self._pack([Weight(w.gate, 4, w.gate_bias), Weight(w.up, 5, w.up_bias)], kind, True),
            down=self._pack([Weight(w.down, 6, w.down_bias)], kind),
            input_norm=w.input_norm,
            post_attention_norm=w.post_attention_norm,
            q_norm=w.q_norm,
            k_norm=w.k_norm,
        )

    def _layer(self, i: int, w: _PackedLayer) -> tuple[list[Operation], list[Operation]]:
        spec, step = self.spec, self.step
        item = ITEM_BYTES[self.precision.dtype]
        qkv, o, gate_up, down = map(self._keep, (w.qkv, w.o, w.gate_up, w.down))
        pages = step.pages + i * step.layer_bytes
        qkv_stride = (self.qkv_width + 2 * LANES) * 4
        attention_stride = self.attention_width * item
        factor = LOG2_E / math.sqrt(spec.head_dim)
        q_norm = self.buffers.constant(w.q_norm, spec.head_dim + LANES) if w.q_norm is not None else 0
        k_norm = self.buffers.constant(w.k_norm, spec.head_dim + LANES) if w.k_norm is not None else 0
        write = (self._write_kv, [
            self.qkv, qkv_stride, 4 * padded(spec.q_size), 4 * (padded(spec.q_size) + padded(spec.kv_size)),
            self.q, attention_stride, pages, step.page_bytes, step.runs, self.cos_sin, step.positions,
            q_norm, k_norm, bits_of(spec.rms_norm_eps), bits_of(factor)])  # fmt: skip
        attend = (self._attend, [
            self.q, attention_stride, self.attention, attention_stride, pages, step.page_bytes, step.tiles,
            step.page_table, step.page_table_stride, spec.window(i) or 0])  # fmt: skip
        norms = (
            self._norm_op(w.input_norm, self.a, NUM_TOKENS, 0),
            self._norm_op(w.post_attention_norm, self.a, NUM_TOKENS, 0),
        )

        def shrink(src: int, width: int, inputs: int, first: int, count: int) -> Operation:
            # an adapter's row is filled up with zeros to a cache line; what follows is anybody's
            return (self._shrink, [
                src, width * item, padded(inputs, 64 // item), step.segments, step.adapter_tables, i, first,
                count, 0, 0])  # fmt: skip

        heads = spec.num_heads * self.head_stride
        versions = []
        for has in (True, False):

            def linear(packed: PackedLinear, end: int, src: int, width: int, out: int, stride: int,
                       has: bool = has) -> list[Operation]:  # fmt: skip
                return self._linear_ops(packed, end, src, width, out, stride, NUM_TOKENS, i, has)

            ops = [norms[0]]
            ops += [shrink(self.a, self.hidden, spec.hidden_size, 0, 3)] * has
            ops += linear(qkv, STORE, self.a, self.hidden, self.qkv, qkv_stride)
            ops += [write, attend]
            ops += [shrink(self.attention, self.attention_width, heads, 3, 1)] * has
            ops += linear(o, ADD, self.attention, self.attention_width, self.x, self.hidden * 4)
            ops += [norms[1]]
            ops += [shrink(self.a, self.hidden, spec.hidden_size, 4, 2)] * has
            ops += linear(gate_up, SILU_MUL, self.a, self.hidden, self.act, self.ff_width * item)
            ops += [shrink(self.act, self.ff_width, spec.intermediate_size, 6, 1)] * has
            ops += linear(down, ADD, self.act, self.ff_width, self.x, self.hidden * 4)
            versions.append(ops)
        return versions[0], versions[1]

    def _chain_prefetches(self, program: Program) -> None:
        """Tell each linear which weights come next."""
        linear = set(self._linear.values())
        rows = [row for row in program.table if row[0] in linear]
        for row, following in itertools.pairwise(rows):
            row[NEXT_W], row[NEXT_PANEL_BYTES] = following[W_PTR], following[PANEL_BYTES]
        if rows:
            rows[-1][NEXT_W], rows[-1][NEXT_PANEL_BYTES] = rows[0][W_PTR], rows[0][PANEL_BYTES]

    def _spread_heads(self, o: torch.Tensor) -> torch.Tensor:
        """o_proj for attention outputs whose heads are padded to whole vectors."""
        spec = self.spec
        if self.head_stride == spec.head_dim:
            return o
        spread = torch.zeros(o.shape[0], spec.num_heads, self.head_stride, dtype=o.dtype)
        spread[:, :, : spec.head_dim] = o.view(-1, spec.num_heads, spec.head_dim)
        return spread.flatten(1)

    def _head(self, weights: ModelWeights, packed: PackedLinear) -> list[Operation]:
        norm = self._norm_op(weights.final_norm(), self.last, NUM_LOGITS, self.step.logit_rows)
        return [norm, *self._linear_ops(packed, STORE, self.last, self.hidden, self.logits_tensor.data_ptr(),
                                        self.vocab_width * 4, NUM_LOGITS, 0, False)]  # fmt: skip

    def view_x(self) -> torch.Tensor:
        """The residual stream, [max tokens, hidden padded] float32."""
        return self.x_tensor

    def view_last(self, rows: int) -> torch.Tensor:
        """Final hidden states of the logit rows after the norm, [rows, hidden]."""
        return self.last_tensor[:rows, : self.spec.hidden_size]

    def reserve_ranks(self, num_ranks: int) -> None:
        """Make room for `num_ranks` intermediate values per token in the adapters' halves."""
        if num_ranks * self._max_tokens <= self._h.numel():
            return
        width = padded(max(num_ranks, 16), 16)
        self._h = torch.empty(self._max_tokens * width, dtype=torch.float32)
        linear = set(self._linear.values())
        for row in self.adapted.table:
            if row[0] == self._shrink:
                row[SHRINK_H_PTR], row[SHRINK_H_STRIDE] = self._h.data_ptr(), width * 4
            elif row[0] in linear:
                row[H_PTR], row[H_STRIDE] = self._h.data_ptr(), width * 4
