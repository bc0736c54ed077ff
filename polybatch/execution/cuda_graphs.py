"""Captured steps: a ladder of numbers of rows, each in a few variants, for decode and for mixed steps.

One graph serves any set of chunks, adapters, contexts and prefixes, because its kernels read their work from
device memory. A step takes the smallest graph that holds its rows; the rows left over write nothing. Products
of up to some 256 rows are bound by their weights' bytes, so a wide ladder costs little; beyond, rungs are
64 and then 128 rows apart, as matrix products round up to as much. Steps of more than MAX_MIXED_ROWS keep
the device busy for longer than the host takes to launch them.
"""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch


class Variant(enum.Flag):
    """What a graph launches beside the base model: adapters' kernels, attention's for shared prefixes.

    CARRIED: the only adapter goes with the base model's products, see `lora.carried`.
    """

    PLAIN = 0
    ADAPTED = 1
    SHARED = 2
    CARRIED = 4


def variants(*, is_decode: bool, can_carry: bool) -> tuple[Variant, ...]:
    """Of decode steps or of mixed ones; the first of them is plain."""
    adapters = [Variant.PLAIN, Variant.ADAPTED, *[Variant.CARRIED] * can_carry]
    # Mixed steps always launch what shared prefixes need: it is what long chunks need.
    shared = (Variant.PLAIN, Variant.SHARED) if is_decode else (Variant.SHARED,)
    return tuple(adapter | share for share in shared for adapter in adapters)


MAX_MIXED_ROWS = 2048


def ladder(max_rows: int) -> list[int]:
    """Numbers of rows to capture, ascending."""
    sizes = {1, 2, 4, 8, *range(16, 33, 8), *range(48, 129, 16), *range(160, max_rows, 32), max_rows}
    return sorted(size for size in sizes if size <= max_rows)


def mixed_ladder(max_rows: int) -> list[int]:
    """As `ladder`, of mixed steps; empty where there are none."""
    sizes = {16, 32, 64, 96, 128, *range(192, 1025, 64), *range(1152, MAX_MIXED_ROWS + 1, 128)}
    if max_rows < MAX_MIXED_ROWS:
        sizes.add(max_rows)
    return sorted(size for size in sizes if 1 < size <= max_rows)


class GraphLadder:
    """Graphs of `run(rows, variant, False)` for every size, ascending, and its variants.

    run: launches a step of so many rows on the current stream; with True, each of its kernels at least once.
    progress: told of graphs done and their number. Largest first, so that all share its memory.
    """

    def __init__(
        self,
        sizes: list[int],
        variants: Callable[[int], Sequence[Variant]],
        run: Callable[[int, Variant, bool], None],
        device: torch.device,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.sizes = sizes
        self._graphs: dict[tuple[int, Variant], torch.cuda.CUDAGraph] = {}
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        todo = [(size, variant) for size in reversed(sizes) for variant in variants(size)]
        for done, (size, variant) in enumerate(todo, 1):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                # Kernels are compiled and libraries set up outside of the capture.
                run(size, variant, True)
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                run(size, variant, False)
            self._graphs[size, variant] = graph
            if progress is not None:
                progress(done, len(todo))
        torch.cuda.synchronize(device)

    def drop_dominated(self) -> None:
        """Forget sizes whose plainest graph takes no less time than a larger one's.

        Which kernel the vendor's library takes for a product differs by its number of rows, and 832 rows may
        take longer than 1,024. Replays run over whatever lies in the arrays.
        """
        kept: list[int] = []
        least = float("inf")
        for size in reversed(self.sizes):
            plainest = min((variant for of, variant in self._graphs if of == size), key=lambda v: v.value)
            taken = min(self._time(size, plainest) for _ in range(2))
            if taken < least:
                kept.append(size)
                least = taken
        self._graphs = {key: graph for key, graph in self._graphs.items() if key[0] in kept}
        self.sizes = kept[::-1]

    def _time(self, size: int, variant: Variant) -> float:
        """Milliseconds of a replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        self.replay(size, variant)
        end.record()
        end.synchronize()
        taken: float = start.elapsed_time(end)
        return taken

    def size_for(self, num_rows: int) -> int | None:
        """Rows of the graph that a step of so many takes, or None if it is larger than all."""
        at = bisect_left(self.sizes, num_rows)
        return self.sizes[at] if at < len(self.sizes) else None

    def replay(self, size: int, variant: Variant) -> None:
        """Run the graph of exactly this size."""
        self._graphs[size, variant].replay()
