"""Times of captured graphs, and configurations of `lora`'s kernels side by side."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import triton

from benchmarks.cuda import lora_layers
from benchmarks.cuda.lora_layers import Base, Placement, Pool, Step, consumers, segments_of
from polybatch.kernels.lora import cuda, cuda_fused, work
from polybatch.kernels.lora.work import GROUPS

READ_BYTES_PER_S = 3.09e12
MODEL_LAYERS = 32
_KERNELS = (
    (cuda, ("shrink_kernel", "expand_kernel")),
    (cuda_fused, ("silu_mul_rows", "silu_mul_tiles", "rms_norm_rows", "rms_norm_tiles", "write_kv_rows",
                  "write_kv_tiles")),
)  # fmt: skip
_is_rehearsal = False


class _Compiled:
    """A kernel whose launches only compile it."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *args, **options: self._kernel.warmup(*args, grid=grid, **options)


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """What runs inside compiles the kernels of `lora` that it launches, side by side; nothing is measured."""
    global _is_rehearsal
    kept = [(module, name, getattr(module, name)) for module, names in _KERNELS for name in names]
    distance = lora_layers.distance
    _is_rehearsal, lora_layers.distance = True, lambda got, expected: 0.0
    for module, name, kernel in kept:
        setattr(module, name, _Compiled(kernel))
    try:
        with triton.AsyncCompileMode(ThreadPoolExecutor(os.cpu_count())):
            yield
    finally:
        for module, name, kernel in kept:
            setattr(module, name, kernel)
        _is_rehearsal, lora_layers.distance = False, distance


def say(text: str) -> None:
    if not _is_rehearsal:
        print(text, flush=True)


def replay_ms(launch, repeats: int = 20) -> float:
    """Median time of a captured graph of `launch`."""
    if _is_rehearsal:
        launch()
        return 0.0
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    times = []
    for _ in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(np.median(times[3:]))


def row_bytes(step: Step) -> int:
    """Bytes of the rows that one layer reads, each once."""
    live = {n for _, _, n in step.segments}
    return sum(step.pool.layouts[n].used_bytes for n in live)


def measure(name: str, step: Step, base: Base, results: list, besides=((), (0, 1, 2, 3))) -> None:
    """Milliseconds of the model's layers without adapters, and what adapters add to that.

    besides: groups whose shrink runs beside the base layer, a set for each column.
    """
    scale = MODEL_LAYERS / base.layers
    space, place = base.buffers(step.num_tokens), Placement(step.num_tokens, torch.bfloat16)
    plain = replay_ms(lambda: base.run(step, space, place, False)) * scale
    row = {"name": name, "floor_ms": row_bytes(step) * MODEL_LAYERS / READ_BYTES_PER_S * 1e3,
           "plan_us": step.plan_s * 1e6, "plain_ms": plain}  # fmt: skip
    kept = set(cuda.BESIDE)
    for groups in besides:
        cuda.BESIDE.clear()
        cuda.BESIDE.update(groups)
        took = replay_ms(lambda: base.run(step, space, place, True)) * scale
        row[f"beside {''.join(map(str, groups)) or 'none'}"] = took - plain
    cuda.BESIDE.clear()
    cuda.BESIDE.update(kept)
    results.append(row)
    say("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{v:<28}" for k, v in row.items()))


def per_launch(name: str, step: Step, base: Base, results: dict) -> None:
    """Microseconds of each kernel over layers of distinct memory: plain, fused, and shrink."""
    found = {}
    space, layers = base.buffers(step.num_tokens), base.layers
    for what, pair in consumers(step, base).items():
        found[what] = [replay_ms(lambda f=f: [f(i) for i in range(layers)], 10) / layers * 1e3 for f in pair]
    for group, source in enumerate(("hidden", "attention", "hidden", "activated")):

        def shrink(group: int = group, x: torch.Tensor = space[source]) -> None:
            for i in range(layers):
                step.lora.shrink(group, i, x, *step.args(i))

        found[f"shrink {GROUPS[group][0]}"] = [replay_ms(shrink, 10) / layers * 1e3]
    results[name] = found
    say(f"{name}, us a layer: " + ", ".join(
        f"{k} {' -> '.join(f'{t:.1f}' for t in v)}" for k, v in found.items()
    ))  # fmt: skip


def tune(pool: Pool, base: Base, results: list) -> None:
    """Configurations of the fused kernels over rows, and from how many rows on a tile is dense."""
    steps = [
        Step(pool, segments_of([1] * 64), 64, wide=False),
        Step(pool, segments_of([4] * 64), 256, wide=False),
        Step(pool, segments_of([256]), 256, wide=False),
    ]
    kernels = [consumers(step, base) for step in steps]
    options = {
        "SILU_ROWS": ("silu_mul", [(512, 16, 8, 4), (256, 16, 8, 4), (1024, 16, 8, 8)]),
        "NORM_ROWS": ("norm of o", [(1 << 16, 1 << 14, 16, stages) for stages in (1, 2, 3)]
                      + [(1 << 16, 1 << 15, 16, 2)]),
        "WRITE_ROWS": ("write_kv", [(4, 16, 2), (2, 16, 2)]),
    }  # fmt: skip
    for name, (kernel, settings) in options.items():
        chosen = getattr(cuda_fused, name)
        for setting in settings:
            setattr(cuda_fused, name, setting)
            times = [
                replay_ms(lambda f=of[kernel][1]: [f(i) for i in range(base.layers)], 10) / base.layers * 1e3
                for of in kernels
            ]
            results.append({"what": name, "setting": setting, "us": times})
            say(f"  {name} {setting}: " + ", ".join(f"{t:.1f}" for t in times) + " us")
        setattr(cuda_fused, name, chosen)
    kept = work.DENSE_ROWS
    for least in (4, 8, 17):
        work.DENSE_ROWS = least
        for counts in ([4] * 64, [8] * 32, [16] * 16):
            step = Step(pool, segments_of(counts), 256, wide=False)
            per_launch(f"{len(counts)} x {counts[0]}, tiles dense from {least} rows", step, base, dense := {})
            results.append({"what": "DENSE_ROWS", "setting": least, "us": dense})
    work.DENSE_ROWS = kept


def tune_wide(pool: Pool, base: Base, results: list) -> None:
    """Configurations of the kernels over wide tiles, at one adapter and 8,192 tokens."""
    step = Step(pool, segments_of([8192]), 8192, wide=True)
    kernels = consumers(step, base)
    options = {
        "SILU_TILES": ("silu_mul", [(64, 8, 4, 3), (64, 8, 4, 1), (128, 4, 4, 1), (128, 8, 8, 2),
                                    (64, 4, 4, 2)]),
        "NORM_TILES": ("norm of o", [(256, 16, 4, 2), (256, 16, 4, 1), (256, 16, 4, 3), (128, 16, 4, 3),
                                     (256, 32, 8, 2)]),
        "WRITE_TILES": ("write_kv", [(4, 4, 2), (4, 4, 1), (8, 4, 2), (2, 4, 2), (4, 8, 2)]),
    }  # fmt: skip
    for name, (kernel, settings) in options.items():
        chosen = getattr(cuda_fused, name)
        for setting in settings:
            setattr(cuda_fused, name, setting)
            took = replay_ms(lambda f=kernels[kernel][1]: [f(i) for i in range(2)], 5) / 2 * 1e3
            results.append({"what": name, "setting": setting, "us": took})
            say(f"  {name} {setting}: {took:.1f} us")
        setattr(cuda_fused, name, chosen)
