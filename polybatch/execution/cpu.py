"""The compiled executor for CPUs: packed weights, one arena of pages, one program per step.

What it promises beyond `Executor`: a request's logits are bitwise the same whatever it was batched with,
however its prompt was chunked and whether its prefix was cached, in every precision. Each kernel
keeps that promise by itself; nothing here has to be switched on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch

from polybatch.adapters.weights import AdapterWeights, VocabularyDelta
from polybatch.config import DTYPES, QUANTIZATIONS, ModelSpec, PoolSpec
from polybatch.errors import ConfigError, EngineError
from polybatch.execution.cpu_adapters import CpuAdapters, cpu_shapes
from polybatch.execution.cpu_kernels import KernelShape, ensure_kernels
from polybatch.execution.cpu_program import CpuProgram, Precision, StepAddresses
from polybatch.execution.cpu_step import StepArrays
from polybatch.kernels.cpu.compile import detect_isa
from polybatch.kernels.cpu.layout import ITEM_BYTES, NUM_LOGITS, NUM_SEGMENTS, PAGE_TOKENS, padded
from polybatch.kernels.cpu.memory import aligned_bytes
from polybatch.kernels.cpu.team import Team
from polybatch.kernels.write_kv.cpu import head_bytes
from polybatch.models.weights import ModelWeights
from polybatch.request import Sequence
from polybatch.scheduling.plan import LogitRows, StepPlan


def page_bytes(spec: ModelSpec, page_size: int, dtype: str) -> int:
    """Bytes of a page in one layer: 16 tokens of keys and values, or the longest adapter row if longer."""
    if page_size != PAGE_TOKENS:
        raise ConfigError(f"page_size is {page_size}; the CPU's kernels take {PAGE_TOKENS}")
    longest = max(max(shape) for shape in cpu_shapes(spec).values()) * ITEM_BYTES[dtype]
    return padded(max(spec.num_kv_heads * head_bytes(spec.head_dim, dtype), longest), 64)


def available_processors() -> int:
    """Processors that this process may use; all of them where the system cannot say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class CpuExecutor:
    """Runs ragged steps with the compiled kernels.

    dtype: of activations, keys, values and adapter rows. quantization: of the linear weights (4-bit
    models keep the vocabulary's matrix in 8 bits). threads: default, the processors it may use.
    """

    batch_invariant = True

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
        threads: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
        if quantization not in QUANTIZATIONS:
            raise ConfigError(f"quantization is {quantization!r}; it must be int8, int4 or None")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}; it must be at least 1, or None for all processors")
        spec = weights.spec
        self._spec = spec
        self._precision = Precision.of(dtype, quantization)
        self._threads = threads or available_processors()
        p = self._precision
        ensure_kernels(KernelShape.of(spec, p.dtype, p.linear, p.head), self._threads)
        bytes_per_page = page_bytes(spec, page_size, dtype)
        self._pool = PoolSpec(num_pages, page_size, bytes_per_page, spec.num_layers)
        arena = aligned_bytes(self._pool.total_bytes)
        self.arena = arena.view(spec.num_layers, num_pages, bytes_per_page)
        self._team = Team(self._threads)
        max_pages = -(-max_model_len // page_size) + 1
        group = spec.num_heads // spec.num_kv_heads
        step = StepArrays(max_num_tokens, max_num_tokens, max_num_seqs, max_pages, group)
        self._step = step
        addresses = StepAddresses(
            token_ids=step.token_ids.ctypes.data,
            positions=step.positions.ctypes.data,
            token_adapter=step.token_adapter.ctypes.data,
            adapter_tables=step.adapter_tables.ctypes.data,
            logit_rows=step.logit_rows.ctypes.data,
            runs=step.runs.ctypes.data,
            tiles=step.tiles.ctypes.data,
            segments=step.segments.ctypes.data,
            page_table=step.page_table.ctypes.data,
            page_table_stride=step.page_table.strides[0],
            pages=self.arena.data_ptr(),
            layer_bytes=num_pages * bytes_per_page,
            page_bytes=bytes_per_page,
        )
        self._program = CpuProgram(
            weights,
            self._precision,
            addresses,
            max_num_tokens,
            max_num_tokens,
            max_model_len,
            progress,
            self._threads,
        )
        self._adapters = CpuAdapters(
            spec,
            dtype,
            bytes_per_page,
            num_pages * bytes_per_page,
            self.arena.data_ptr(),
            self._team,
            max(256, 2 * max_num_seqs),
        )

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def pool(self) -> PoolSpec:
        return self._pool

    def adapter_pages(self, weights: AdapterWeights) -> int:
        return self._adapters.layout(weights).num_pages

    def forward(self, plan: StepPlan, adapters: Mapping[str, AdapterWeights]) -> torch.Tensor:
        for load in plan.loads:
            self._adapters.load(adapters[load.adapter.digest], load.pages)
        for copy in plan.copies:
            self.arena[:, copy.dst] = self.arena[:, copy.src]
        if not plan.chunks:
            return self._program.logits_tensor[:0, : self._spec.vocab_size]
        used = {c.seq.adapter.digest for c in plan.chunks if c.seq.adapter is not None}
        tables = {}
        for digest in used:
            if digest not in plan.resident:
                raise EngineError(f"the plan uses adapter {digest[:12]}, which is not resident")
            placed = self._adapters.table(adapters[digest], plan.resident[digest])
            self._program.reserve_ranks(placed.num_ranks)
            tables[digest] = placed.table.ctypes.data
        self._step.fill(plan, tables)
        program = self._program.adapted if used else self._program.plain
        state = self._step.state.ctypes.data
        if any(adapters[digest].embedding is not None for digest in used):
            self._team.run(program, state, 0, 1)
            self._patch_embeddings(adapters)
            self._team.run(program, state, 1)
        else:
            self._team.run(program, state)
        logits = self._program.logits_tensor[: int(self._step.state[NUM_LOGITS]), : self._spec.vocab_size]
        if any(adapters[digest].lm_head is not None for digest in used):
            self._patch_logits(plan, adapters, logits)
        return logits

    def _patch_embeddings(self, adapters: Mapping[str, AdapterWeights]) -> None:
        """Give the tokens of adapters that change the embedding table their own embeddings."""
        x = self._program.view_x()
        ids = torch.from_numpy(self._step.token_ids)
        for adapter, rows in self._rows_by_adapter():
            delta = adapters[adapter].embedding
            if delta is None:
                continue
            for row in range(rows.start, rows.stop):  # one by one, so that the batch cannot change the bits
                token = int(ids[row])
                if delta.full is not None:
                    x[row, : self._spec.hidden_size] = delta.full[token]
                elif delta.left is not None and delta.right is not None:
                    x[row, : self._spec.hidden_size] += delta.left[token] @ delta.right

    def _rows_by_adapter(self) -> list[tuple[str, slice]]:
        addresses = {p.table.ctypes.data: digest for digest, p in self._adapters.placed.items()}
        step = self._step
        return [
            (addresses[int(step.adapter_tables[slot])], slice(int(first), int(first + count)))
            for first, count, slot in step.segments[: int(step.state[NUM_SEGMENTS])]
        ]

    def _patch_logits(
        self, plan: StepPlan, adapters: Mapping[str, AdapterWeights], logits: torch.Tensor
    ) -> None:
        """Apply lm_head deltas to the rows of their adapters, from the normed last hidden states."""
        row = 0
        hidden = self._program.view_last(logits.shape[0])
        for chunk in plan.chunks:
            count = {LogitRows.NONE: 0, LogitRows.LAST: 1, LogitRows.ALL: chunk.n_new}[chunk.logits]
            digest = chunk.seq.adapter.digest if chunk.seq.adapter is not None else None
            delta: VocabularyDelta | None = adapters[digest].lm_head if digest is not None else None
            for at in range(row, row + count if delta is not None else row):
                state = hidden[at].float().clone()
                if delta is not None and delta.full is not None:
                    logits[at] = delta.full @ state
                elif delta is not None and delta.left is not None and delta.right is not None:
                    logits[at] += delta.left @ (delta.right @ state)
            row += count

    def release(self, seq: Sequence) -> None:
        self._step.release(seq)

    def describe(self) -> dict[str, str]:
        p = self._precision
        isa = detect_isa()
        reason = (
            "this processor has AVX-512 dot products" if isa == "avx512" else "no AVX-512 dot products here"
        )
        return {
            "kernels": f"compiled by numba, {isa}: {reason}",
            "threads": str(self._threads),
            "linear": f"{p.linear} weights, lm_head {p.head}, batch-invariant",
            "attention": f"{p.dtype} keys and values, pages of {PAGE_TOKENS} tokens",
            "adapters": f"{p.dtype} rows gathered from pages, any rank, second half fused into the linears",
            "weights": f"{self._program.weight_bytes / 2**20:.0f} MiB packed",
            "pages": f"{self._pool.num_pages} of {self._pool.page_bytes * self._pool.num_layers} bytes",
        }

    def close(self) -> None:
        self._team.close()
