"""The model in plain torch over the reference kernels: the oracle, and the seed of the GPU path.

Reads like the model; every operation is the `polybatch.kernels` one, unfused and one after the other.
It is not fast: `polybatch.execution.cpu` is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from polybatch.adapters.weights import AdapterWeights
from polybatch.config import DTYPES, QUANTIZATIONS, PoolSpec
from polybatch.errors import ConfigError, EngineError
from polybatch.execution import ragged_batch
from polybatch.execution.adapter_memory import AdapterMemory
from polybatch.execution.page_memory import TORCH_DTYPES, PageMemory, page_bytes
from polybatch.execution.ragged_batch import RaggedBatch
from polybatch.execution.vocabulary import patch_embeddings, patch_logits
from polybatch.kernels.linear import (
    Int4Weight,
    Int8Weight,
    int4_linear,
    int8_linear,
    linear,
    quantize_int4,
    quantize_int8,
)
from polybatch.kernels.lora import AdapterTable, lora
from polybatch.kernels.norm import rms_norm
from polybatch.kernels.ragged_attention import ragged_attention
from polybatch.kernels.write_kv import write_kv
from polybatch.models.rope import rope_frequencies
from polybatch.models.weights import LayerWeights, ModelWeights
from polybatch.request import Sequence
from polybatch.scheduling.plan import StepPlan

Weight = torch.Tensor | Int8Weight | Int4Weight

QUANTISERS: dict[str | None, Callable[[torch.Tensor], Weight]] = {
    None: lambda weight: weight,
    "int8": quantize_int8,
    "int4": quantize_int4,
}
PRODUCTS: dict[type, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    torch.Tensor: linear,
    Int8Weight: int8_linear,
    Int4Weight: int4_linear,
}


@dataclass(frozen=True, slots=True)
class _Layer:
    """One decoder layer as it is held: linear weights by module name, packed; biases where it has them."""

    input_norm: torch.Tensor
    post_attention_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    weights: dict[str, Weight]
    biases: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Step:
    """What all layers of one step share: `RaggedBatch` on the device, and its adapters.

    tables: per layer, module name -> table of the batch's adapters, where at least one changes the module.
    host: per adapter of the batch its host weights, where the caller gave them.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    cu_tokens: torch.Tensor
    kv_lens: torch.Tensor
    page_table: torch.Tensor
    slots: torch.Tensor
    logit_rows: torch.Tensor
    segments: torch.Tensor
    tables: list[dict[str, AdapterTable]]
    host: list[AdapterWeights | None]


class EagerExecutor:
    """An `Executor` of torch operations on any device.

    dtype: of activations, keys and values, adapter rows, and of weights that are not quantised.
    quantization: "int8" and "int4" hold the seven linear layers of each decoder layer in that precision
        and the output head in int8; embeddings, norms and adapters stay in dtype.
    num_pages, page_size: the pool; page_size in tokens.
    max_num_tokens, max_num_seqs: largest step; max_model_len: longest sequence, in tokens.
    threads: of torch, for the whole process; None leaves them as they are.
    Raises ConfigError for a dtype, quantization or size that cannot work.
    """

    batch_invariant = False
    """Matrix products choose their order of summation by the number of rows."""

    def __init__(
        self,
        weights: ModelWeights,
        *,
        dtype: str = "float32",
        quantization: str | None = None,
        num_pages: int,
        page_size: int = 16,
        max_num_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        threads: int | None = None,
        device: str = "cpu",
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
        if quantization not in QUANTIZATIONS:
            raise ConfigError(f"quantization is {quantization!r}; it must be None, 'int8' or 'int4'")
        if threads is not None:
            torch.set_num_threads(threads)
        self.spec = spec = weights.spec
        self.pool = PoolSpec(num_pages, page_size, page_bytes(spec, page_size, dtype), spec.num_layers)
        self._limits = (max_num_tokens, max_num_seqs, max_model_len)
        self._device = device
        self._dtype = TORCH_DTYPES[dtype]
        self._quantization = quantization
        self.memory = PageMemory(spec, self.pool, dtype, device)
        self._adapters = AdapterMemory(spec, self.memory)
        inv_freq, self._rope_scaling = rope_frequencies(spec.rope, spec.head_dim, spec.max_position)
        self._inv_freq = inv_freq.to(device)
        self._embedding = self._place(weights.embedding())
        self._final_norm = self._place(weights.final_norm())
        self._lm_head = self._pack(weights.lm_head(), "int8" if quantization else None)
        self._layers = [self._hold(weights.layer(i)) for i in range(spec.num_layers)]

    @property
    def arena(self) -> torch.Tensor:
        """The pool's memory, [num_layers, num_pages, page_bytes] uint8."""
        return self.memory.arena

    def adapter_pages(self, weights: AdapterWeights) -> int:
        """Pages of the pool that this adapter takes while resident."""
        return self._adapters.num_pages(weights)

    @torch.no_grad()
    def forward(self, plan: StepPlan, adapters: Mapping[str, AdapterWeights]) -> torch.Tensor:
        """Carry out a plan; see `Executor.forward`. Raises EngineError where it breaks a limit."""
        for load in plan.loads:
            if load.adapter.digest not in adapters:
                raise EngineError(f"the plan loads adapter {load.adapter.name!r} without host weights")
            self._adapters.load(adapters[load.adapter.digest], load.pages)
        for copy in plan.copies:
            self.memory.copy_page(copy.src, copy.dst)
        batch = ragged_batch.build(plan, self.pool)
        self._check(batch)
        if not plan.chunks:
            return torch.zeros(0, self.spec.vocab_size, device=self._device)
        step = self._start(batch, plan, adapters)

        eps = self.spec.rms_norm_eps
        x = self._embed(step)
        for index, layer in enumerate(self._layers):
            x = x + self._attention(index, rms_norm(x, layer.input_norm, eps), step)
            x = x + self._mlp(index, rms_norm(x, layer.post_attention_norm, eps), step)
        return self._logits(rms_norm(x[step.logit_rows], self._final_norm, eps), step)

    def _attention(self, index: int, x: torch.Tensor, step: _Step) -> torch.Tensor:
        layer, kv_pages = self._layers[index], self.memory.kv(index)
        q, k, v = (
            self._linear(index, module, x, step).view(x.shape[0], -1, self.spec.head_dim)
            for module in ("q_proj", "k_proj", "v_proj")
        )
        q = write_kv(
            q, k, v, step.positions, step.slots, self._inv_freq, self._rope_scaling, kv_pages,
            q_norm=layer.q_norm, k_norm=layer.k_norm, eps=self.spec.rms_norm_eps,
        )  # fmt: skip
        out, _ = ragged_attention(
            q, kv_pages, step.page_table, step.cu_tokens, step.kv_lens,
            scale=self.spec.head_dim**-0.5, window=self.spec.window(index),
        )  # fmt: skip
        return self._linear(index, "o_proj", out.flatten(1).to(x.dtype), step)

    def _mlp(self, index: int, x: torch.Tensor, step: _Step) -> torch.Tensor:
        gate = self._linear(index, "gate_proj", x, step)
        up = self._linear(index, "up_proj", x, step)
        return self._linear(index, "down_proj", functional.silu(gate) * up, step)

    def _linear(self, index: int, module: str, x: torch.Tensor, step: _Step) -> torch.Tensor:
        """One linear layer with the adapters of its tokens, then its bias."""
        layer = self._layers[index]
        weight = layer.weights[module]
        y = PRODUCTS[type(weight)](x, weight)
        if module in step.tables[index]:
            lora(x, y, self.memory.rows(index), step.segments, step.tables[index][module])
        return y + layer.biases[module] if module in layer.biases else y

    def _embed(self, step: _Step) -> torch.Tensor:
        x = self._embedding[step.token_ids]
        patch_embeddings(x, step.token_ids, step.segments.tolist(), step.host)
        return x

    def _logits(self, x: torch.Tensor, step: _Step) -> torch.Tensor:
        """x: [L, hidden], the normalised rows that need logits. Returns [L, vocab] float32."""
        logits = PRODUCTS[type(self._lm_head)](x, self._lm_head).float()
        patch_logits(logits, x, step.logit_rows, step.segments.tolist(), step.host)
        return logits

    def _start(self, batch: RaggedBatch, plan: StepPlan, adapters: Mapping[str, AdapterWeights]) -> _Step:
        def place(array: np.ndarray[Any, Any]) -> torch.Tensor:
            return torch.from_numpy(array).to(self._device)

        return _Step(
            token_ids=place(batch.token_ids),
            positions=place(batch.positions),
            cu_tokens=place(batch.cu_tokens),
            kv_lens=place(batch.kv_lens),
            page_table=place(batch.page_table),
            slots=place(batch.slots),
            logit_rows=place(batch.logit_rows),
            segments=place(batch.segments),
            tables=self._adapters.tables(batch.adapters, plan.resident),
            host=[adapters.get(digest) for digest in batch.adapters],
        )

    def _check(self, batch: RaggedBatch) -> None:
        sizes = (batch.num_tokens, batch.num_seqs, int(batch.kv_lens.max(initial=0)))
        names = ("max_num_tokens", "max_num_seqs", "max_model_len")
        for name, size, limit in zip(names, sizes, self._limits, strict=True):
            if size > limit:
                raise EngineError(f"a step has {size} for {name}, the executor was built for {limit}")

    def _hold(self, layer: LayerWeights) -> _Layer:
        shorts = {f"{short}_proj": short for short in ("q", "k", "v", "o", "gate", "up", "down")}
        biases = {module: getattr(layer, f"{short}_bias") for module, short in shorts.items()}
        return _Layer(
            input_norm=self._place(layer.input_norm),
            post_attention_norm=self._place(layer.post_attention_norm),
            q_norm=None if layer.q_norm is None else self._place(layer.q_norm),
            k_norm=None if layer.k_norm is None else self._place(layer.k_norm),
            weights={
                module: self._pack(getattr(layer, short), self._quantization)
                for module, short in shorts.items()
            },
            biases={module: self._place(bias) for module, bias in biases.items() if bias is not None},
        )

    def _pack(self, weight: torch.Tensor, quantization: str | None) -> Weight:
        dtype = self._dtype if quantization is None else torch.float32
        return QUANTISERS[quantization](weight.detach().to(self._device, dtype))

    def _place(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.detach().to(self._device, self._dtype)

    def release(self, seq: Sequence) -> None:
        """Nothing is kept per sequence."""
        seq.row = None

    def describe(self) -> dict[str, str]:
        """Kernel chosen per operation and why."""
        number = str(self._dtype).removeprefix("torch.")
        return {
            "executor": f"eager torch on {self._device}: the reference, chosen for clarity rather than speed",
            "linear": f"{self._quantization or number} weights, {number} activations",
            "attention": f"reference over {number} pages, float32 accumulation",
            "lora": f"reference over {number} rows in pool pages, float32 accumulation",
        }

    def close(self) -> None:
        """Give the pool's memory and the weights back."""
        self._layers = []
        self.memory.arena = torch.empty(0, dtype=torch.uint8)
