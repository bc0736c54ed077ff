"""Times of captured graphs, and configurations of `lora`'s kernels side by side."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
from triton.errors import TritonError

from benchmarks.cuda import lora_layers
from benchmarks.cuda.lora_compile import ForkedCompiler
from benchmarks.cuda.lora_layers import Base, Placement, Pool, Step, consumers, distance, segments_of, zipf
from polybatch.kernels.activation import cuda as activation
from polybatch.kernels.lora import cuda, cuda_fused, work
from polybatch.kernels.lora.cuda import Order, Schedule
from polybatch.kernels.lora.work import GROUPS
from polybatch.kernels.norm import cuda as norm
from polybatch.kernels.write_kv import cuda as write_kv

READ_BYTES_PER_S = 3.09e12
MODEL_LAYERS = 32
_KERNELS = (
    (cuda, ("shrink_kernel", "expand_kernel")),
    (cuda_fused, ("silu_mul_rows", "silu_mul_units", "silu_mul_tiles", "rms_norm_rows", "rms_norm_tiles",
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


@dataclass(frozen=True)
class Variant:
    """A schedule, and constants of `cuda_fused` that are set along with it."""

    name: str
    schedule: Schedule = field(default_factory=Schedule)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_same_arithmetic(self) -> bool:
        """Whether its results are those of the default, bit for bit."""
        return not self.settings

    @contextlib.contextmanager
    def chosen(self) -> Iterator[None]:
        kept = cuda.SCHEDULE, {name: getattr(cuda_fused, name) for name in self.settings}
        cuda.SCHEDULE = self.schedule
        for name, value in self.settings.items():
            setattr(cuda_fused, name, value)
        try:
            yield
        finally:
            cuda.SCHEDULE = kept[0]
            for name, value in kept[1].items():
                setattr(cuda_fused, name, value)


def orders(text: str, *, is_early: bool) -> Schedule:
    """b, a or s for each group: shrink before, after or at the side of the base layer."""
    by_letter = {"b": Order.BEFORE, "a": Order.AFTER, "s": Order.BESIDE}
    return Schedule(tuple(by_letter[letter] for letter in text), is_early)


UNITS = {"SILU_UNITS": (512, 4, 4, 4), "NORM_ROWS": (1 << 14, 1 << 14, 16, 1, 1)}
VARIANTS = (
    Variant("default"),
    Variant("before", orders("bbbb", is_early=False)),
    Variant("before early", orders("bbbb", is_early=True)),
    Variant("after early", orders("aaaa", is_early=True)),
    Variant("units", settings=UNITS),
    Variant("units before early", orders("bbbb", is_early=True), UNITS),
    Variant("units after early", orders("aaaa", is_early=True), UNITS),
    Variant("units o after early", orders("babb", is_early=True), UNITS),
    Variant("units o beside early", orders("bsbb", is_early=True), UNITS),
    Variant("units beside early", orders("ssss", is_early=True), UNITS),
    Variant("units beside, down after", orders("sssa", is_early=True), UNITS),
)
# Of long chunks, whose schedule changes little.
WIDE_VARIANTS = (
    VARIANTS[1],
    Variant("ahead", orders("bbbb", is_early=False), {"TILES_AHEAD": True}),
    Variant("ahead beside", orders("ssss", is_early=False), {"TILES_AHEAD": True}),
    Variant("ahead after early", orders("aaaa", is_early=True), {"TILES_AHEAD": True}),
)


def measure(name: str, step: Step, base: Base, results: list, variants=VARIANTS, repeats: int = 20) -> None:
    """Milliseconds of the model's layers without adapters, and what adapters add to the best of that."""
    scale = MODEL_LAYERS / base.layers
    space, place = base.buffers(step.num_tokens), Placement(step.num_tokens, torch.bfloat16)
    row = {"name": name, "floor_ms": row_bytes(step) * MODEL_LAYERS / READ_BYTES_PER_S * 1e3,
           "plan_us": step.plan_s * 1e6}  # fmt: skip

    def launch(variant: Variant, is_adapted: bool) -> Callable[[], None]:
        def layers() -> None:
            with variant.chosen():
                base.run(step, space, place, is_adapted)

        return layers

    adapted = {variant.name: launch(variant, True) for variant in variants}
    plain = {"plain": launch(VARIANTS[0], False), "plain early": launch(VARIANTS[2], False)}
    launches = plain | adapted
    if _is_rehearsal:
        for one in launches.values():
            one()
        return
    times = replays_ms(list(launches.values()), repeats)
    row |= {name: took * scale for name, took in zip(launches, times, strict=True)}
    row |= {name: row[name] - row["plain"] for name in adapted}
    results.append(row)
    say(f"{name}: floor {row['floor_ms']:.2f}, plan {row['plan_us']:.0f} us, plain {row['plain']:.2f}, early "
        f"{row['plain early']:.2f} ms; added: "
        + ", ".join(f"{v.name} {row[v.name]:.2f}" for v in variants))  # fmt: skip


def check_variants(results: dict, name: str, step: Step, base: Base, variants=VARIANTS) -> None:
    """Whole layers as a graph give what the default gives, replay after replay; bit for bit where only the
    order of launches differs."""
    if _is_rehearsal:
        return
    expected = None
    for variant in variants:
        torch.manual_seed(7)
        space, place = base.buffers(step.num_tokens), Placement(step.num_tokens, torch.bfloat16)
        tensors = [*space.values(), place.kv]
        before = [tensor.clone() for tensor in tensors]
        graph = torch.cuda.CUDAGraph()
        try:
            with variant.chosen():
                base.run(step, space, place, True)
                with torch.cuda.graph(graph):
                    base.run(step, space, place, True)
        except UNFIT as error:
            say_wrong(f"{name}: {variant.name} cannot launch: {error}")
            continue
        worst, is_same = 0.0, True
        for _ in range(4):
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
            step.lora.h.fill_(torch.nan)
            graph.replay()
            got = [tensor.clone() for tensor in tensors]
            expected = expected or got
            for mine, wanted in zip(got, expected, strict=True):
                is_same = is_same and torch.equal(mine, wanted)
                worst = max(worst, distance(mine, wanted.double()))
        if variant.is_same_arithmetic and not is_same:
            say_wrong(f"{name}: {variant.name} differs from the default, by {worst:.1e}")
        elif not worst < 3e-2:
            say_wrong(f"{name}: {variant.name} is {worst:.1e} off the default")
        results["differences"][f"{name}, {variant.name}"] = worst


def per_launch(name: str, step: Step, base: Base, results: dict, variants=VARIANTS[:1]) -> None:
    """Microseconds of each kernel over layers of distinct memory: plain, fused by variant, and shrink."""
    found: dict[str, list[float]] = {}
    space, layers = base.buffers(step.num_tokens), base.layers
    for what, (plain, fused) in consumers(step, base).items():
        found[what] = [_us(plain, layers)]
        for variant in variants:
            with variant.chosen():
                found[what].append(_us(fused, layers))
    for group, source in enumerate(("hidden", "attention", "hidden", "activated")):
        found[what := f"shrink {GROUPS[group][0]}"] = []
        for variant in variants:
            early = variant.schedule.is_early

            def shrink(i: int, group: int = group, x: torch.Tensor = space[source], early=early) -> None:
                step.lora.shrink(group, i, x, *step.args(i), is_early=early)

            found[what].append(_us(shrink, layers))
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


def tune(pool: Pool, base: Base, results: list, *, is_quick: bool) -> None:
    """Configurations of the fused kernels over rows: 64 adapters at 64 and 256 rows, Zipf, one, none."""
    steps = [
        Step(pool, segments_of([1] * 64), 64, wide=False),
        Step(pool, segments_of([4] * 64), 256, wide=False),
        Step(pool, zipf(64, 256), 256, wide=False),
        Step(pool, segments_of([256]), 256, wide=False),
        Step(pool, [], 256, wide=False),
    ]
    kernels = [consumers(step, base) for step in steps]
    options = {
        "SILU_ROWS": ("silu_mul", [(512, 16, 8, 4), (1024, 16, 8, 8)]),
        "SILU_UNITS": ("silu_mul", [(512, 4, 4, 4), (512, 2, 4, 2), (256, 2, 4, 4), (256, 2, 4, 8),
                                    (256, 1, 4, 4), (1024, 4, 8, 2)]),
        "NORM_ROWS": ("norm of o", [(1 << 16, 1 << 14, 16, 3, 4), (1 << 16, 1 << 14, 16, 1, 1),
                                    (1 << 15, 1 << 14, 16, 1, 1), (1 << 14, 1 << 14, 16, 1, 1),
                                    (1 << 14, 1 << 14, 8, 1, 1), (1 << 16, 1 << 14, 16, 3, 2)]),
        "WRITE_ROWS": ("write_kv", [(4, 16, 2), (2, 16, 2), (4, 16, 4)]),
    }  # fmt: skip
    for is_early in (True,) if is_quick else (False, True):
        for name, (kernel, settings) in options.items():
            for setting in settings:
                with Variant("", orders("bbbb", is_early=is_early), {name: setting}).chosen():
                    times = [_us(of[kernel][1], base.layers) for of in kernels]
                results.append({"what": name, "setting": setting, "is_early": is_early, "us": times})
                say(f"  {name} {setting}{' early' * is_early}: " + ", ".join(f"{t:.1f}" for t in times))
    if is_quick:
        return
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
        "SILU_TILES": ("silu_mul", [(64, 8, 4, 3), (64, 14, 4, 3), (32, 16, 4, 3), (32, 16, 4, 2)]),
        "NORM_TILES": ("norm of o", [(256, 16, 4, 2), (128, 16, 4, 3), (256, 32, 8, 2), (128, 32, 8, 3),
                                     (128, 32, 4, 2)]),
        "WRITE_TILES": ("write_kv", [(4, 4, 2), (4, 4, 1), (8, 4, 2), (8, 4, 1)]),
    }  # fmt: skip
    for name, (kernel, settings) in options.items():
        for setting in settings:
            times = []
            for is_ahead in (False, True):
                with Variant("", settings={name: setting, "TILES_AHEAD": is_ahead}).chosen():
                    times.append(_us(kernels[kernel][1], min(4, base.layers)))
            results.append({"what": name, "setting": setting, "us": times})
            say(f"  {name} {setting}: {times[0]:.1f} us, ahead {times[1]:.1f} us")
