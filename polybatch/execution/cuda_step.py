"""One step's plan laid out for the GPU: which token lies in which row, and every number its kernels read.

Chunks are laid out adapter by adapter, so that each adapter's tokens lie side by side; logit rows keep the
plan's order. A sequence keeps its row of the page table while it runs, so a step sends only the pages
that are new. All of this is NumPy on the host; `StepFields` carries it over.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from polybatch.errors import EngineError
from polybatch.execution.step_fields import Shape, StepFields
from polybatch.request import Sequence
from polybatch.scheduling.plan import PENDING, Chunk, LogitRows, StepPlan

Array = np.ndarray[Any, Any]
Int64s = np.ndarray[Any, np.dtype[np.int64]]


_CHANGES = 1024
"""Entries of the page table that one copy brings to the device; a decode step needs a few."""


class PageTable:
    """Pages of every running sequence, [max_seqs, max_pages] int32, on the host and on the device."""

    def __init__(self, max_seqs: int, max_pages: int, device: torch.device) -> None:
        self.host = np.zeros((max_seqs, max_pages), dtype=np.int32)
        self.on = torch.zeros(max_seqs, max_pages, dtype=torch.int32, device=device)
        self._num_known = [0] * max_seqs
        self._free = list(range(max_seqs - 1, -1, -1))
        self._changes: list[tuple[int, int, int]] = []
        self._fields = StepFields({"at": ((_CHANGES,), np.int64), "pages": ((_CHANGES,), np.int32)}, device)

    def release(self, seq: Sequence) -> None:
        """Take a sequence's row back."""
        if seq.row is not None:
            self._num_known[seq.row] = 0
            self._free.append(seq.row)
            seq.row = None

    def row_of(self, seq: Sequence) -> int:
        """The sequence's row, brought up to date on the host. Raises EngineError when no row is left."""
        row = seq.row
        pages = seq.pages
        if row is None:
            if not self._free:
                raise EngineError(
                    f"more than {len(self.host)} sequences run at once; the plan exceeds max_num_seqs"
                )
            row = seq.row = self._free.pop()
        known = self._num_known[row]
        if known != len(pages):
            if known > len(pages):
                known = 0
            self.host[row, known : len(pages)] = pages[known:]
            self._changes.append((row, known, len(pages)))
            self._num_known[row] = len(pages)
        return row

    def changes(self) -> tuple[Int64s, Array]:
        """Flat indices and values that the device lacks; it counts as told."""
        width = self.host.shape[1]
        spans = [np.arange(row * width + first, row * width + last) for row, first, last in self._changes]
        self._changes.clear()
        indices = np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)
        return indices, self.host.reshape(-1)[indices]

    def send(self, indices: Int64s, pages: Array) -> None:
        """Write what `changes` gave to the device, in the order of the current stream."""
        for low in range(0, len(indices), _CHANGES):
            count = min(_CHANGES, len(indices) - low)
            views = self._fields.open()
            views["at"][:count] = indices[low : low + count]
            views["pages"][:count] = pages[low : low + count]
            self._fields.send()
            on = self._fields.on
            self.on.view(-1).index_copy_(0, on["at"][:count], on["pages"][:count])


@dataclass(frozen=True, slots=True)
class Layout:
    """A plan's chunks in the order of their rows.

    chunks: laid out. first_tokens, num_new, kv_lens, page_rows: [S] of each. logit_rows: [L] rows, in the
    plan's order. segments: [G, 3], (first row, row after the last, index into digests).
    """

    chunks: list[Chunk]
    first_tokens: Int64s
    num_new: Int64s
    kv_lens: Int64s
    page_rows: Int64s
    logit_rows: Int64s
    segments: Array
    digests: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        return int(self.num_new.sum())

    @property
    def is_decode(self) -> bool:
        """One token of each sequence, with its logits."""
        return len(self.logit_rows) == self.num_tokens == len(self.chunks)


def token_fields(max_tokens: int, max_logits: int) -> dict[str, tuple[Shape, Any]]:
    """The arrays that `fill_tokens` writes: name -> (shape, dtype)."""
    fields: dict[str, tuple[Shape, Any]] = {"logit_rows": ((max_logits,), np.int32)}
    for name in ("token_ids", "sources", "positions", "slots"):
        fields[name] = ((max_tokens,), np.int32)
    return fields


def lay_out(plan: StepPlan, table: PageTable) -> Layout:
    """Order a plan's chunks and find their rows."""
    order = list(range(len(plan.chunks)))
    chunks = plan.chunks
    # A plan that forgot what is resident is refused later, not run without its adapters.
    has_adapters = bool(plan.resident) or any(chunk.seq.adapter is not None for chunk in chunks)
    if has_adapters:
        order.sort(key=lambda i: a.digest if (a := chunks[i].seq.adapter) is not None else "")
    laid = [chunks[i] for i in order]
    num_new = np.fromiter((chunk.n_new for chunk in laid), np.int64, len(laid))
    starts = np.fromiter((chunk.start for chunk in laid), np.int64, len(laid))
    rows = np.fromiter((table.row_of(chunk.seq) for chunk in laid), np.int64, len(laid))
    first = np.cumsum(num_new) - num_new
    in_plan = np.empty(len(laid), dtype=np.int64)
    in_plan[order] = first
    digests, segments = _segments(laid, first) if has_adapters else ((), np.zeros((0, 3), np.int32))
    return Layout(
        laid, first, num_new, starts + num_new, rows, _logit_rows(chunks, in_plan), segments, digests
    )


def fill_tokens(
    views: Mapping[str, Array],
    layout: Layout,
    table: PageTable,
    page_size: int,
    sampled_at: Mapping[Sequence, int],
    num_rows: int,
) -> None:
    """Write what every token is and where its KV goes; rows from the last token to num_rows write nothing.

    sampled_at: index in the launch before of each sequence whose newest token is PENDING.
    """
    n = layout.num_tokens
    ids, sources = views["token_ids"], views["sources"]
    positions, slots = views["positions"], views["slots"]
    sources[:num_rows] = -1
    ids[n:num_rows] = 0
    positions[n:num_rows] = 0
    slots[n:num_rows] = -1
    at = 0
    if n == len(layout.chunks):
        newest = [chunk.seq.tokens[chunk.start] for chunk in layout.chunks]
        ids[:n] = newest
    else:
        for chunk in layout.chunks:
            ids[at : at + chunk.n_new] = chunk.seq.tokens[chunk.start : chunk.start + chunk.n_new]
            at += chunk.n_new
    for row in np.nonzero(ids[:n] == PENDING)[0].tolist():
        seq = layout.chunks[int(np.searchsorted(layout.first_tokens, row, side="right")) - 1].seq
        sources[row] = sampled_at[seq]
        ids[row] = 0
    chunk_of = np.repeat(np.arange(len(layout.chunks)), layout.num_new)
    shift = layout.kv_lens - layout.num_new - layout.first_tokens
    where = np.arange(n) + shift[chunk_of]
    positions[:n] = where
    pages = table.host[layout.page_rows[chunk_of], where // page_size].astype(np.int64)
    slots[:n] = pages * page_size + where % page_size
    logit_rows = views["logit_rows"]
    logit_rows[: len(layout.logit_rows)] = layout.logit_rows
    logit_rows[len(layout.logit_rows) : num_rows] = -1


def _logit_rows(chunks: SequenceOf[Chunk], first: Int64s) -> Int64s:
    kinds = [chunk.logits for chunk in chunks]
    counts = np.fromiter((chunk.n_new for chunk in chunks), np.int64, len(chunks))
    if LogitRows.ALL not in kinds:
        wanted = np.fromiter((kind is LogitRows.LAST for kind in kinds), np.bool_, len(kinds))
        return (first + counts - 1)[wanted]
    rows = []
    for kind, start, count in zip(kinds, first.tolist(), counts.tolist(), strict=True):
        if kind is LogitRows.LAST:
            rows.append(start + count - 1)
        elif kind is LogitRows.ALL:
            rows += range(start, start + count)
    return np.array(rows, dtype=np.int64)


def _segments(chunks: SequenceOf[Chunk], first: Int64s) -> tuple[tuple[str, ...], Array]:
    """Runs of tokens of one adapter; the chunks come adapter by adapter."""
    digests: list[str] = []
    segments: list[list[int]] = []
    for chunk, start in zip(chunks, first.tolist(), strict=True):
        adapter = chunk.seq.adapter
        if adapter is None:
            continue
        if digests and digests[-1] == adapter.digest:
            segments[-1][1] = start + chunk.n_new
        else:
            segments.append([start, start + chunk.n_new, len(digests)])
            digests.append(adapter.digest)
    return tuple(digests), np.array(segments, dtype=np.int32).reshape(-1, 3)
