"""Times of captured graphs, and configurations of `lora`'s kernels side by side."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import triton
from triton.errors import TritonError

from benchmarks.cuda import lora_layers
from benchmarks.cuda.lora_compile import ForkedCompiler
from benchmarks.cuda.lora_layers import Base, Placement, Pool, Step, consumers, distance, segments_of, zipf
from polybatch.kernels.activation import cuda as activation
from polybatch.kernels.lora import cuda, cuda_fused
from polybatch.kernels.lora.work import GROUPS
from polybatch.kernels.norm import cuda as norm
from polybatch.kernels.write_kv import cuda as write_kv

READ_BYTES_PER_S = 3.09e12
MODEL_LAYERS = 32
_KERNELS = (
    (cuda, ("shrink_kernel", "expand_kernel")),
    (cuda_fused, ("silu_mul_rows", "silu_mul_tiles", "rms_norm_rows", "rms_norm_tiles",
                  "write_kv_rows", "write_kv_tiles")),
    (activation, ("_silu_mul",)),
    (norm, ("_rms_norm",)),
    (write_kv, ("_write_kv",)),
)  # fmt: skip
# What a kernel raises that does not compile, or that the device cannot hold.
UNFIT = (TritonError,)
# What a run found wrong; it goes on.
WRONG: list[str] = []
_is_rehearsal = False


class _Compiled:
    """A kernel whose launches only compile it, each sort of launch once."""

    def __init__(self, kernel: Any) -> None:
        self._kernel, self._seen = kernel, set()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *args, **options: self._launch(grid, args, options)

    def _launch(self, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        sort = (
            *((arg.dtype, arg.data_ptr() % 16) if isinstance(arg, torch.Tensor) else arg for arg in args),
            *options.items(),
        )
        if sort not in self._seen:
            self._seen.add(sort)
            self._kernel.warmup(*args, grid=grid, **options)


@contextlib.contextmanager
def rehearsal(processes: int) -> Iterator[tuple[ForkedCompiler, list[str]]]:
    """What runs inside only notes the kernels that it launches, which then compile in child processes.

    Yields the compiler and, empty until all are compiled, what failed.
    """
    global _is_rehearsal
    kept = [(module, name, getattr(module, name)) for module, names in _KERNELS for name in names]
    distance = lora_layers.distance
    _is_rehearsal, lora_layers.distance = True, lambda got, expected: 0.0
    for module, name, kernel in kept:
        setattr(module, name, _Compiled(kernel))
    compiler, wrong = ForkedCompiler(), []
    try:
        with triton.AsyncCompileMode(compiler, ignore_errors=True):
            yield compiler, wrong
            wrong += compiler.run(processes)
    finally:
        for module, name, kernel in kept:
            setattr(module, name, kernel)
        _is_rehearsal, lora_layers.distance = False, distance


def say(text: str) -> None:
    if not _is_rehearsal:
        print(text, flush=True)


def say_wrong(text: str) -> None:
    say(f"WRONG: {text}")
    if not _is_rehearsal:
        WRONG.append(text)


def replays_ms(launches: list[Callable[[], Any]], repeats: int = 20) -> list[float]:
    """Median times of captured graphs, which take turns, so that a clock that falls falls for all.

    Not a number, and said, where a kernel cannot launch.
    """
    graphs = [_capture(launch) for launch in launches]
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(repeats + 3):
        for graph, took in zip(graphs, times, strict=True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            if graph is not None:
                graph.replay()
            end.record()
            end.synchronize()
            took.append(begin.elapsed_time(end) if graph else math.nan)
    return [float(np.median(took[3:])) for took in times]


def _capture(launch: Callable[[], Any]) -> torch.cuda.CUDAGraph | None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            launch()
    except UNFIT as error:
        say_wrong(f"what is timed next cannot launch: {error}")
        return None
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph


def row_bytes(step: Step) -> int:
    """Bytes of the rows that one layer reads, each once."""
    live = {n for _, _, n in step.segments}
    return sum(step.pool.layouts[n].used_bytes for n in live)


@contextlib.contextmanager
def setting(name: str, value: Any) -> Iterator[None]:
    """A constant of `cuda_fused` with this value."""
    kept = getattr(cuda_fused, name)
    setattr(cuda_fused, name, value)
    try:
        yield
    finally:
        setattr(cuda_fused, name, kept)


def measure(name: str, step: Step, base: Base, results: list, repeats: int = 20) -> None:
    """Milliseconds of the model's layers without adapters, and what adapters add to them."""
    space, place = base.buffers(step.num_tokens), Placement(step.num_tokens, torch.bfloat16)
    launches = [partial(base.run, step, space, place, is_adapted) for is_adapted in (False, True)]
    if _is_rehearsal:
        for launch in launches:
            launch()
        return
    plain, adapted = (ms * MODEL_LAYERS / base.layers for ms in replays_ms(launches, repeats))
    floor = row_bytes(step) * MODEL_LAYERS / READ_BYTES_PER_S * 1e3
    results.append({"name": name, "floor_ms": floor, "plan_us": step.plan_s * 1e6, "plain_ms": plain,
                    "added_ms": adapted - plain})  # fmt: skip
    say(f"{name}: floor {floor:.2f}, plan {step.plan_s * 1e6:.0f} us, plain {plain:.2f}, added "
        f"{adapted - plain:.2f} ({adapted / plain - 1:.1%})")  # fmt: skip


def check_graph(name: str, step: Step, base: Base) -> None:
    """Layers as a graph, where shrink runs beside the base layer, give what they give launch after launch.

    Every replay gives the same bits.
    """
    if _is_rehearsal:
        return
    space, place = base.buffers(step.num_tokens), Placement(step.num_tokens, torch.bfloat16)
    tensors = [*space.values(), place.kv]
    before = [tensor.clone() for tensor in tensors]
    base.run(step, space, place, True)
    separate = [tensor.clone() for tensor in tensors]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        base.run(step, space, place, True)
    replays = []
    for _ in range(4):
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        step.lora.h.fill_(torch.nan)
        graph.replay()
        replays.append([tensor.clone() for tensor in tensors])
    for wanted, *got in zip(separate, *replays, strict=True):
        # A product may sum in another order in a graph.
        assert distance(got[0], wanted.double()) < 1e-2, f"{name}: a graph differs"
        assert all(torch.equal(one, got[0]) for one in got[1:]), f"{name}: replays differ"


def per_launch(name: str, step: Step, base: Base, results: dict) -> None:
    """Microseconds of each kernel over layers of distinct memory: plain, fused, and shrink."""
    space = base.buffers(step.num_tokens)
    found = {
        what: [_us(kernel, base.layers) for kernel in kernels]
        for what, kernels in consumers(step, base).items()
    }
    for group, source in enumerate(("hidden", "attention", "hidden", "activated")):

        def shrink(i: int, group: int = group, x: torch.Tensor = space[source]) -> None:
            step.lora.shrink(group, i, x, *step.args(i))

        found[f"shrink {GROUPS[group][0]}"] = [_us(shrink, base.layers)]
    results[name] = found
    say(f"{name}, us a layer: " + ", ".join(
        f"{k} {' -> '.join(f'{t:.1f}' for t in v)}" for k, v in found.items()
    ))  # fmt: skip


def _us(launch: Callable[[int], Any], layers: int) -> float:
    def all_layers() -> None:
        for i in range(layers):
            launch(i)

    if _is_rehearsal:
        all_layers()
        return 0.0
    return replays_ms([all_layers], 10)[0] / layers * 1e3


def tune(pool: Pool, base: Base, results: list) -> None:
    """Configurations of the fused kernels around the defaults.

    Over rows: 64 adapters at 64 and at 256 rows, Zipf, one adapter, none. Over wide tiles: one and 25.
    """
    narrow = [
        Step(pool, segments, num_rows, wide=False)
        for segments, num_rows in (
            (segments_of([1] * 64), 64), (segments_of([4] * 64), 256), (zipf(64, 256), 256),
            (segments_of([256]), 256), ([], 256),
        )
    ]  # fmt: skip
    wide = [
        Step(pool, segments_of(counts), sum(counts), wide=True, is_fused=True)
        for counts in ([8192], [327] * 25)
    ]
    norms = [(1 << 14, 8), (1 << 15, 8), (1 << 16, 16)]
    options = {
        "SILU_ROWS": (
            "silu_mul",
            narrow,
            [(512, 16, 4, 3), (512, 16, 4, 2), (1024, 16, 8, 3)],
        ),
        "NORM_ROWS": ("norm of o", narrow[1:], norms),
        "NORM_ROWS_ALONE": ("norm of o", narrow[:1], norms),
        "WRITE_ROWS": ("write_kv", narrow, [(4, 16, 8, 2), (4, 16, 4, 2), (4, 16, 16, 4)]),
        "SILU_TILES": ("silu_mul", wide, [(64, 4, 3), (64, 8, 3), (128, 8, 3)]),
        "NORM_TILES": (
            "norm of o",
            wide,
            [(256, 32, 8, 2), (128, 32, 8, 3), (128, 16, 4, 3), (512, 16, 8, 2)],
        ),
        "WRITE_TILES": ("write_kv", wide, [(4, 4, 1), (4, 4, 2), (8, 4, 2), (8, 4, 1)]),
    }
    for name, (kernel, steps, settings) in options.items():
        launches = [consumers(step, base)[kernel][1] for step in steps]
        for value in settings:
            with setting(name, value):
                times = [_us(launch, min(base.layers, 4)) for launch in launches]
            results.append({"what": name, "setting": value, "us": times})
            say(f"  {name} {value}: " + ", ".join(f"{t:.1f}" for t in times))
