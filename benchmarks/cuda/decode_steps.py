"""The time of a decode step: two runs of equal requests that differ in their number of output tokens.

A step is the difference of the two runs' times over the difference of their lengths, 64. Prompts, admission
and the last row's end cancel out; planning, sampling and everything else of a step stays in. The mean context
of those steps is 512 tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.cuda import workloads
from polybatch.bench.results import Timed
from polybatch.bench.workloads import Workload

Run = Callable[[Workload], Timed]


@dataclass(frozen=True, slots=True)
class StepTime:
    """ms: median over the pairs of runs. runs_s: (shorter, longer) seconds of each pair."""

    ms: float
    pairs_ms: tuple[float, ...]
    runs_s: tuple[tuple[float, float], ...]


def measure(
    run: Run, batch: int, mix: str | None, *, vocab_size: int, num_pairs: int = 3, shrink: int = 1
) -> StepTime:
    """Steps of `batch` rows with these adapters. run: answers a workload and says how long it took.

    shrink: divides all lengths, for trials. A pair before the others warms up and does not count.
    """
    pairs = []
    for number in range(-1, num_pairs):
        times = []
        for workload in pair(batch, mix, run=2 * (number + 1), vocab_size=vocab_size, shrink=shrink):
            times.append(run(workload).total_s)
        pairs.append((times[0], times[1]))
    steps = num_steps(shrink)
    pairs_ms = tuple(round(1000 * (longer - shorter) / steps, 4) for shorter, longer in pairs[1:])
    return StepTime(round(statistics.median(pairs_ms), 4), pairs_ms, tuple(pairs[1:]))


def pair(
    batch: int, mix: str | None, *, run: int = 0, vocab_size: int = 128256, shrink: int = 1
) -> tuple[Workload, Workload]:
    """The shorter and the longer workload, of different token ids."""
    shorter, longer = (
        workloads.decode(
            batch,
            max(1, tokens // shrink),
            run + index,
            vocab_size,
            mix,
            max(1, workloads.DECODE_INPUT_TOKENS // shrink),
        )
        for index, tokens in enumerate(workloads.DECODE_OUTPUT_TOKENS)
    )
    return shorter, longer


def num_steps(shrink: int = 1) -> int:
    shorter, longer = (max(1, tokens // shrink) for tokens in workloads.DECODE_OUTPUT_TOKENS)
    return longer - shorter
