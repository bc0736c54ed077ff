"""The way of an adapter's rows from host memory to pages: pieces through staging, scattered from there.

Staging has two halves, each with a stream: while the rows of one piece are scattered, the next is copied.
Within a half the stream's order does the rest. On the CPU all of it happens at once, in the interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from polybatch.adapters.pack import HostRuns
from polybatch.execution.adapter_loads import TABLE_FIELDS, WIDE_BYTES, LoadPlan
from polybatch.kernels.scatter_rows.cuda import scatter_rows

NUM_HALVES = 2
NARROW = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, slots=True)
class Source:
    """What loads of an adapter copy. copies: per piece of the plan, bytes of the host and where they go in
    staging."""

    plan: LoadPlan
    copies: tuple[tuple[tuple[torch.Tensor, slice], ...], ...]

    @classmethod
    def of(cls, runs: HostRuns, plan: LoadPlan) -> Source:
        begins = runs.run_starts
        ends = begins + [len(run) for run in runs.runs]
        copies = []
        for piece in plan.pieces:
            parts = []
            for index in np.flatnonzero((begins < piece.high) & (ends > piece.low)).tolist():
                begin = int(begins[index])
                low, high = max(piece.low, begin), min(piece.high, int(ends[index]))
                start = piece.data_start + low - piece.low
                parts.append((runs.runs[index][low - begin : high - begin], slice(start, start + high - low)))
            copies.append(tuple(parts))
        return cls(plan, tuple(copies))


class Staging:
    """Two halves of device memory, `piece_bytes` each.

    arena: [layers, num_pages, page_bytes] uint8. dtype: of the rows.
    """

    def __init__(self, arena: torch.Tensor, dtype: torch.dtype, num_bytes: int) -> None:
        _, num_pages, page_bytes = arena.shape
        self._device, self._is_cuda = arena.device, arena.device.type == "cuda"
        # Room for any row and its record, whatever was asked for.
        self.piece_bytes = -(-max(num_bytes // NUM_HALVES, page_bytes + 256) // 256) * 256
        self._arena = {kind: arena.view(kind) for kind in (torch.int32, NARROW[dtype.itemsize])}
        self._narrow = NARROW[dtype.itemsize]
        self._halves = [_Half(self.piece_bytes, num_pages, self._device) for _ in range(NUM_HALVES)]
        self._next = 0
        self._before: tuple[torch.cuda.Event, ...] = ()
        if self._is_cuda:
            self._compile()

    def load(self, source: Source, page_ids: npt.NDArray[np.int32]) -> tuple[torch.cuda.Event, ...]:
        """Start copying and scattering; the events after which all is done, none on the CPU.

        Pages are written after what the current stream was given so far, and after earlier loads.
        """
        ids = torch.from_numpy(page_ids)
        if not self._is_cuda:
            for number in range(len(source.copies)):
                self._send(self._halves[0], source, number, ids, ())
            return ()
        ids = ids.pin_memory()
        before = (*self._before, _event(torch.cuda.current_stream(self._device)))
        used = []
        for number in range(len(source.copies)):
            half = self._halves[self._next % NUM_HALVES]
            self._next += 1
            is_first = number < NUM_HALVES
            with torch.cuda.stream(half.stream):
                self._send(half, source, number, ids if is_first else None, before if is_first else ())
            if is_first:
                used.append(half)
        self._before = tuple(_event(half.stream) for half in used if half.stream is not None)
        return self._before

    def _send(
        self,
        half: _Half,
        source: Source,
        number: int,
        ids: torch.Tensor | None,
        before: tuple[torch.cuda.Event, ...],
    ) -> None:
        """One piece. ids: where the half does not have this load's pages yet."""
        plan, piece = source.plan, source.plan.pieces[number]
        num_rows = piece.last - piece.first
        if ids is not None:
            half.page_ids[: len(ids)].copy_(ids, non_blocking=True)
        half.table[:num_rows].copy_(plan.table[piece.first : piece.last], non_blocking=True)
        for held, place in source.copies[number]:
            half.bytes[place].copy_(held, non_blocking=True)
        for event in before:
            torch.cuda.current_stream(self._device).wait_event(event)
        self._scatter(half, num_rows, piece.data_start, plan.unit_bytes)

    def _scatter(self, half: _Half, num_rows: int, data_start: int, unit_bytes: int) -> None:
        kind = torch.int32 if unit_bytes == WIDE_BYTES else self._narrow
        size = kind.itemsize
        scatter_rows(
            half.table, half.views[kind], half.page_ids, self._arena[kind], unit_bytes // size,
            num_rows=num_rows, data_start=data_start // size,
        )  # fmt: skip

    def _compile(self) -> None:
        """Compile the kernel before a load waits for it: a row of no length."""
        half = self._halves[0]
        half.table[:1].zero_()
        half.page_ids[:1].zero_()
        for unit_bytes in (WIDE_BYTES, self._narrow.itemsize):
            self._scatter(half, 1, 64, unit_bytes)
        torch.cuda.current_stream(self._device).synchronize()


class _Half:
    """One half of staging: a piece's table, its data behind it, and the pages of the load it belongs to."""

    def __init__(self, num_bytes: int, num_pages: int, device: torch.device) -> None:
        self.bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.views = {kind: self.bytes.view(kind) for kind in NARROW.values()}
        self.table = self.bytes[: num_bytes // 16 * 16].view(torch.int32).view(-1, TABLE_FIELDS)
        self.page_ids = torch.empty(num_pages, dtype=torch.int32, device=device)
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


__all__ = ["Source", "Staging"]
