"""One step's plan as the arrays that the compiled program reads, at addresses that never move.

Chunks are laid out adapter by adapter, so that each adapter's tokens lie side by side; logit rows keep the
plan's order. A sequence keeps its row of the page table while it runs, so a decode step touches only
what changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from polybatch.errors import EngineError
from polybatch.kernels.cpu.layout import (
    NUM_LOGITS,
    NUM_RUNS,
    NUM_SEGMENTS,
    NUM_TILES,
    NUM_TOKENS,
    PAGE_TOKENS,
    STATE_SIZE,
)
from polybatch.kernels.lora.cpu import SEGMENT_FIELDS, SEGMENT_TOKENS
from polybatch.kernels.ragged_attention.cpu import TILE_FIELDS, TILE_ROWS
from polybatch.kernels.write_kv.cpu import RUN_FIELDS
from polybatch.request import Sequence
from polybatch.scheduling.plan import Chunk, LogitRows, StepPlan

Array = np.ndarray[Any, Any]


class StepArrays:
    """The step's arrays and the page table.

    max_tokens, max_logits: rows of a step. max_seqs: sequences that run at once. max_pages: pages of
    one sequence. group: query heads per key-value head.
    """

    def __init__(self, max_tokens: int, max_logits: int, max_seqs: int, max_pages: int, group: int) -> None:
        self._group = group
        self.state = np.zeros(STATE_SIZE, dtype=np.int64)
        self.token_ids = np.zeros(max_tokens, dtype=np.int32)
        self.positions = np.zeros(max_tokens, dtype=np.int32)
        self.token_adapter = np.zeros(max_tokens, dtype=np.int32)
        self.logit_rows = np.zeros(max_logits, dtype=np.int32)
        self.runs = np.zeros((max_tokens, RUN_FIELDS), dtype=np.int32)
        max_tiles = max_tokens * group // TILE_ROWS + max_seqs * (group // TILE_ROWS + 1) + 1
        self.tiles = np.zeros((max_tiles, TILE_FIELDS), dtype=np.int32)
        self.segments = np.zeros((max_tokens, SEGMENT_FIELDS), dtype=np.int32)
        self.page_table = np.zeros((max_seqs, max_pages), dtype=np.int32)
        self.adapter_tables = np.zeros(max_seqs, dtype=np.int64)
        self._num_known = [0] * max_seqs
        self._free_rows = list(range(max_seqs - 1, -1, -1))

    def release(self, seq: Sequence) -> None:
        """Take a sequence's row back."""
        if seq.row is not None:
            self._num_known[seq.row] = 0
            self._free_rows.append(seq.row)
            seq.row = None

    def _row_of(self, seq: Sequence) -> int:
        row = seq.row
        pages = seq.pages
        if row is None:
            if not self._free_rows:
                raise EngineError(
                    f"more than {len(self.page_table)} sequences run at once; the plan exceeds max_num_seqs"
                )
            row = seq.row = self._free_rows.pop()
        known = self._num_known[row]
        if known != len(pages):
            if known > len(pages):
                known = 0
            self.page_table[row, known : len(pages)] = pages[known:]
            self._num_known[row] = len(pages)
        return row

    def fill(self, plan: StepPlan, tables: Mapping[str, int]) -> None:
        """Lay the plan out. tables: address of each resident adapter's table by digest."""
        order = list(enumerate(plan.chunks))
        has_adapters = any(chunk.seq.adapter is not None for chunk in plan.chunks)
        if has_adapters:
            order.sort(key=lambda item: item[1].seq.adapter.digest if item[1].seq.adapter else "")
        tokens: list[int] = []
        positions: list[int] = []
        runs: list[tuple[int, int, int, int]] = []
        tiles: list[tuple[int, int, int, int, int]] = []
        firsts = [0] * len(order)
        group = self._group
        for index, chunk in order:
            first = len(tokens)
            firsts[index] = first
            seq, start, count = chunk.seq, chunk.start, chunk.n_new
            row = self._row_of(seq)
            if count == 1:
                tokens.append(seq.tokens[start])
                positions.append(start)
                runs.append((first, 1, seq.pages[start // PAGE_TOKENS], start % PAGE_TOKENS))
                if group <= TILE_ROWS:
                    tiles.append((row, 0, group, first, start))
                    continue
            else:
                tokens += seq.tokens[start : start + count]
                positions += range(start, start + count)
                at = start
                while at < start + count:
                    offset = at % PAGE_TOKENS
                    length = min(PAGE_TOKENS - offset, start + count - at)
                    runs.append((first + at - start, length, seq.pages[at // PAGE_TOKENS], offset))
                    at += length
            rows = count * group
            tiles += [(row, r, min(TILE_ROWS, rows - r), first, start) for r in range(0, rows, TILE_ROWS)]
        if len(tokens) > len(self.token_ids):
            raise EngineError(f"a step of {len(tokens)} tokens exceeds the executor's {len(self.token_ids)}")
        self.token_ids[: len(tokens)] = tokens
        self.positions[: len(tokens)] = positions
        self.runs[: len(runs)] = runs
        self.tiles[: len(tiles)] = tiles
        state = self.state
        state[NUM_TOKENS], state[NUM_RUNS], state[NUM_TILES] = len(tokens), len(runs), len(tiles)
        state[NUM_LOGITS] = self._fill_logit_rows(plan.chunks, firsts)
        state[NUM_SEGMENTS] = self._fill_segments(order, firsts, tables) if has_adapters else 0

    def _fill_logit_rows(self, chunks: tuple[Chunk, ...], firsts: list[int]) -> int:
        rows: list[int] = []
        for chunk, first in zip(chunks, firsts, strict=True):
            if chunk.logits is LogitRows.LAST:
                rows.append(first + chunk.n_new - 1)
            elif chunk.logits is LogitRows.ALL:
                rows += range(first, first + chunk.n_new)
        if len(rows) > len(self.logit_rows):
            raise EngineError(
                f"a step asks for {len(rows)} rows of logits; there is room for {len(self.logit_rows)}"
            )
        self.logit_rows[: len(rows)] = rows
        return len(rows)

    def _fill_segments(
        self, order: list[tuple[int, Chunk]], firsts: list[int], tables: Mapping[str, int]
    ) -> int:
        slots: dict[str, int] = {}
        count = 0
        num_tokens = int(self.state[NUM_TOKENS])
        self.token_adapter[:num_tokens] = -1
        spans: list[list[int]] = []  # first token, tokens, slot; neighbours of one adapter joined
        for index, chunk in order:
            adapter = chunk.seq.adapter
            if adapter is None:
                continue
            slot = slots.get(adapter.digest)
            if slot is None:
                slot = slots[adapter.digest] = len(slots)
                self.adapter_tables[slot] = tables[adapter.digest]
                spans.append([firsts[index], 0, slot])
            spans[-1][1] += chunk.n_new
        for first, length, slot in spans:
            self.token_adapter[first : first + length] = slot
            for start in range(first, first + length, SEGMENT_TOKENS):
                self.segments[count] = (start, min(SEGMENT_TOKENS, first + length - start), slot)
                count += 1
        return count
