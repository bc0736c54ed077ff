"""A plan as arrays: what the kernels of a step read. NumPy only; executors wrap it without copying.

Tokens of all chunks stand one after the other, without padding, in the plan's order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polybatch.config import PoolSpec
from polybatch.errors import EngineError
from polybatch.scheduling.plan import Chunk, LogitRows, StepPlan

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """T tokens of S sequences, L rows of logits, N adapters, G adapter segments.

    token_ids: [T]. positions: [T], of each token in its sequence.
    cu_tokens: [S + 1]; sequence s owns tokens cu_tokens[s] to cu_tokens[s + 1].
    kv_lens: [S], tokens with KV once the step has run.
    page_table: [S, P], pages of each sequence in order, 0 beyond its own (never to be read).
    slots: [T], page * page_size + offset where each token's KV goes.
    logit_rows: [L], tokens whose logits are wanted, ascending.
    adapters: digests of the N adapters in the batch, in the order of their first token.
    segments: [G, 3], rows (first token, last token + 1, index into adapters); tokens in no segment have
        no adapter; neighbours with the same adapter share a segment.
    """

    token_ids: Int64Array
    positions: Int32Array
    cu_tokens: Int32Array
    kv_lens: Int32Array
    page_table: Int32Array
    slots: Int64Array
    logit_rows: Int64Array
    adapters: tuple[str, ...]
    segments: Int32Array

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_seqs(self) -> int:
        return len(self.kv_lens)


def build(plan: StepPlan, pool: PoolSpec) -> RaggedBatch:
    """Lay a plan's chunks out as arrays.

    Raises EngineError where a chunk names tokens that its sequence lacks or has no pages for.
    """
    chunks = plan.chunks
    starts = np.array([chunk.start for chunk in chunks], dtype=np.int32)
    counts = np.array([chunk.n_new for chunk in chunks], dtype=np.int32)
    kv_lens = starts + counts
    cu_tokens = np.zeros(len(chunks) + 1, dtype=np.int32)
    np.cumsum(counts, out=cu_tokens[1:])
    num_tokens = int(cu_tokens[-1])

    num_pages = -(-kv_lens // pool.page_size)
    page_table = np.zeros((len(chunks), int(num_pages.max(initial=0))), dtype=np.int32)
    token_ids: list[int] = []
    for s, chunk in enumerate(chunks):
        _check(chunk, int(num_pages[s]))
        token_ids.extend(chunk.seq.tokens[chunk.start : chunk.start + chunk.n_new])
        page_table[s, : num_pages[s]] = chunk.seq.pages[: num_pages[s]]

    rows = np.repeat(np.arange(len(chunks)), counts)
    positions = np.arange(num_tokens, dtype=np.int32) + (starts - cu_tokens[:-1])[rows]
    pages = page_table[rows, positions // pool.page_size].astype(np.int64)
    adapters, segments = _adapter_segments(chunks, cu_tokens.tolist())
    return RaggedBatch(
        token_ids=np.array(token_ids, dtype=np.int64),
        positions=positions,
        cu_tokens=cu_tokens,
        kv_lens=kv_lens,
        page_table=page_table,
        slots=pages * pool.page_size + positions % pool.page_size,
        logit_rows=_logit_rows(chunks, cu_tokens.tolist()),
        adapters=adapters,
        segments=segments,
    )


def _check(chunk: Chunk, num_pages: int) -> None:
    seq = chunk.seq
    if chunk.n_new < 1 or chunk.start < 0 or chunk.start + chunk.n_new > len(seq.tokens):
        raise EngineError(
            f"a chunk asks for {chunk.n_new} tokens from {chunk.start} of {seq!r}; it must ask for at least "
            "one token that the sequence has"
        )
    if len(seq.pages) < num_pages:
        raise EngineError(
            f"a chunk of {chunk.n_new} tokens from {chunk.start} needs {num_pages} pages, but {seq!r} owns "
            f"{len(seq.pages)}: the scheduler must allocate pages before it plans the chunk"
        )


def _logit_rows(chunks: tuple[Chunk, ...], bounds: list[int]) -> Int64Array:
    rows: list[int] = []
    for s, chunk in enumerate(chunks):
        if chunk.logits is LogitRows.LAST:
            rows.append(bounds[s + 1] - 1)
        elif chunk.logits is LogitRows.ALL:
            rows.extend(range(bounds[s], bounds[s + 1]))
    return np.array(rows, dtype=np.int64)


def _adapter_segments(chunks: tuple[Chunk, ...], bounds: list[int]) -> tuple[tuple[str, ...], Int32Array]:
    indices: dict[str, int] = {}
    segments: list[list[int]] = []
    for s, chunk in enumerate(chunks):
        adapter = chunk.seq.adapter
        if adapter is None:
            continue
        index = indices.setdefault(adapter.digest, len(indices))
        if segments and segments[-1][1:] == [bounds[s], index]:
            segments[-1][1] = bounds[s + 1]
        else:
            segments.append([bounds[s], bounds[s + 1], index])
    return tuple(indices), np.array(segments, dtype=np.int32).reshape(-1, 3)
