"""What adapters cost on a GPU: `lora`'s kernels checked and timed at the shape of an 8B Llama.

Claims: 64 adapters of rank 16 on all seven linears cost 32 decode layers at most 3.0 ms at 64 rows and
3.3 ms at 256; one adapter costs at most 5 % of a step. Every figure stands beside its floor: the bytes of
the rows over the read bandwidth. Kernels run as captured graphs over several layers of distinct memory, so
that no cache holds them. Nothing is timed while a check fails.

    python -m benchmarks.cuda.lora [--quick] [--json PATH]
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch

from polybatch.adapters.layout import plan_layout
from polybatch.adapters.weights import AdapterWeights, ModuleDelta
from polybatch.config import ModelSpec, RopeSpec
from polybatch.execution.adapter_words import adapter_words
from polybatch.execution.cuda_adapters import CudaAdapters
from polybatch.kernels.lora import cuda, work
from polybatch.kernels.lora.work import GROUPS, NARROW, LoraLimits

SPEC = ModelSpec(
    family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, max_position=8192, rms_norm_eps=1e-5, rope=RopeSpec(),
)  # fmt: skip
SHAPES = SPEC.linear_shapes
GROUP_SHAPES = work.group_shapes(SHAPES)
PAGE_BYTES = 65536
READ_BYTES_PER_S = 3.09e12
MODEL_LAYERS = 32
MAX_H = 1 << 22


class Pool:
    """Random rows of adapters with these ranks (0 leaves a module out) in shuffled pages of some layers."""

    def __init__(
        self, ranks: list[dict[str, tuple[int, bool, bool]]], layers: int, dtype: torch.dtype
    ) -> None:
        self.dtype = dtype
        self.layouts = [plan_layout([r], SHAPES, dtype.itemsize, PAGE_BYTES) for r in ranks]
        num_pages = sum(layout.num_pages for layout in self.layouts)
        order = np.random.default_rng(0).permutation(num_pages)
        elements = num_pages * PAGE_BYTES // dtype.itemsize
        self.memory = torch.empty(layers, elements, dtype=dtype, device="cuda").normal_(std=0.05)
        self.pages, words, templates = [], [], []
        for layout in self.layouts:
            pages, order = order[: layout.num_pages].astype(np.int64), order[layout.num_pages :]
            held = adapter_words(layout)
            templates.append(held.template_at(sum(map(len, words))))
            words.append(held.starts(pages, PAGE_BYTES))
            self.pages.append(pages)
        self.words = torch.from_numpy(np.concatenate(words)).cuda()
        self.templates = np.stack(templates)

    def expected(self, group, layer, x, y, segments):
        """float64, from the layout rather than from words."""
        result, memory = y.double(), self.memory[layer]
        for start, stop, n in segments:
            column = 0
            for module in GROUPS[group]:
                out, in_ = SHAPES[module]
                at = (slice(start, stop), slice(column, column + out))
                column += out
                places = self.layouts[n].layers[0].get(module)
                if places is None:
                    continue
                a = self._rows(memory, n, places.a_page, places.a_offset, in_)
                b = self._rows(memory, n, places.b_page, places.b_offset, out)
                result[at] += x[start:stop].double() @ a.T @ b
                for place, is_gain in ((places.gain, True), (places.bias, False)):
                    if place is not None:
                        row = self._rows(memory, n, np.array([place.page]), np.array([place.offset]), out)
                        result[at] = result[at] * row if is_gain else result[at] + row
        return result

    def _rows(self, memory, n, page, offset, width):
        starts = torch.from_numpy((self.pages[n][page] * PAGE_BYTES + offset) // self.dtype.itemsize).cuda()
        return memory[starts[:, None] + torch.arange(width, device="cuda")].double()


class Step:
    """One step's plan on the device, with x (NaN where no segment is) and y per group."""

    def __init__(self, pool: Pool, segments, num_tokens: int, *, wide: bool, num_programs=None, pdl=False):
        self.pool, self.segments = pool, segments
        views = {
            name: np.zeros(shape, dtype)
            for name, (shape, dtype) in work.arrays(LoraLimits(num_tokens, max(len(segments), 1))).items()
        }
        begin = time.perf_counter()
        self.plan = work.fill(views, np.array(segments), pool.templates, GROUP_SHAPES, MAX_H, wide=wide)
        self.plan_s = time.perf_counter() - begin
        self.arrays = {name: torch.from_numpy(view).cuda() for name, view in views.items()}
        self.lora = cuda.CudaLora(
            GROUP_SHAPES, pool.dtype, torch.device("cuda"), MAX_H, num_programs=num_programs, use_pdl=pdl
        )
        covered = torch.zeros(num_tokens, dtype=torch.bool)
        for start, stop, _ in segments:
            covered[start:stop] = True
        self.x, self.y = [], []
        for shape in GROUP_SHAPES:
            x = torch.randn(num_tokens, shape.num_in, device="cuda").to(pool.dtype)
            x[~covered.cuda()] = torch.nan
            self.x.append(x)
            self.y.append(torch.randn(num_tokens, sum(shape.outs), device="cuda").to(pool.dtype))
        self.base = ~covered

    def shrink(self, group: int, layer: int) -> None:
        memory = self.pool.memory[layer]
        self.lora.shrink(group, layer, self.x[group], memory, self.pool.words, self.arrays, self.plan)

    def expand(self, group: int, layer: int) -> None:
        memory = self.pool.memory[layer]
        self.lora.expand(group, layer, self.y[group], memory, self.pool.words, self.arrays, self.plan)

    def check(self, group: int, layer: int) -> float:
        """Relative error of one group; raises if a token without adapter changed."""
        y = self.y[group]
        before = y.clone()
        expected = self.pool.expected(group, layer, self.x[group], before, self.segments)
        self.lora.h.fill_(torch.nan)
        args = (self.pool.memory[layer], self.pool.words, self.arrays, self.plan)
        self.lora(group, layer, self.x[group], y, *args)
        assert torch.equal(y[self.base], before[self.base]), "a token without adapter changed"
        error = ((y.double() - expected).norm() / expected.norm()).item()
        y.copy_(before)
        return error


def uniform(n: int, rank: int) -> list[dict[str, tuple[int, bool, bool]]]:
    return [dict.fromkeys(SHAPES, (rank, False, False)) for _ in range(n)]


def segments_of(counts) -> list[tuple[int, int, int]]:
    ends = np.cumsum(counts)
    return [(int(e - c), int(e), n) for n, (c, e) in enumerate(zip(counts, ends, strict=True)) if c]


def zipf(num_adapters: int, rows: int) -> list[tuple[int, int, int]]:
    weights = 1 / np.arange(1, num_adapters + 1)
    picks = np.random.default_rng(1).choice(num_adapters, rows, p=weights / weights.sum())
    return segments_of(np.bincount(picks, minlength=num_adapters))


def check_all(results: dict) -> None:
    """Mixed ranks, gains, biases, missing modules, long and short segments, padded rows, every dtype."""
    rng = np.random.default_rng(int(time.time()))
    worst = {}
    for dtype, bound in ((torch.bfloat16, 4e-3), (torch.float16, 5e-4), (torch.float32, 1e-5)):
        ranks = []
        for _ in range(6):
            some = [m for m in SHAPES if rng.random() < 0.8]
            ranks.append({m: (int(rng.choice([0, 1, 4, 16, 17, 64, 200])), rng.random() < 0.3,
                              rng.random() < 0.3) for m in some})  # fmt: skip
        pool = Pool(ranks, 2, dtype)
        segments = [(0, 1, 0), (1, 17, 1), (17, 50, 2), (53, 54, 3), (54, 190, 4), (190, 448, 5)]
        for wide in (False, True):
            step = Step(pool, segments, 450, wide=wide)
            for group in range(len(GROUPS)):
                error = step.check(group, 1)
                worst[str(dtype)] = max(worst.get(str(dtype), 0.0), error)
                assert error < bound, f"{dtype} wide={wide} {GROUPS[group]}: relative error {error:.2e}"
    results["errors"] = worst
    print("relative errors against float64:", {k: f"{v:.1e}" for k, v in worst.items()})


def check_load(results: dict) -> None:
    """CudaAdapters on the device: rows arrive where the words say; time of a load of 84 MB."""
    spec = SPEC
    arena = torch.full((spec.num_layers, 128, PAGE_BYTES), 0xFF, dtype=torch.uint8, device="cuda")
    adapters = CudaAdapters(spec, arena, torch.bfloat16)
    deltas = {m: ModuleDelta(torch.randn(16, i), torch.randn(16, o)) for m, (o, i) in SHAPES.items()}
    weights = AdapterWeights("timed", tuple(deltas for _ in range(spec.num_layers)))
    begin = time.perf_counter()
    adapters.prepare(weights)
    prepare_s = time.perf_counter() - begin
    count = adapters.pages_needed(weights)
    times = []
    for first in (0, count, 1, 0):
        pages = tuple(range(first, first + count))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        adapters.load(weights, pages)
        queued_s = time.perf_counter() - begin
        adapters.wait(["timed"])
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    (index,) = adapters.place(["timed"], {"timed": pages})
    words, template = adapters.words.cpu(), adapters.templates[index]
    for layer in (0, 31):
        flat = arena[layer].view(torch.bfloat16).view(-1)
        start = int(words[template[3, work.MODULE] + 2 + 15]) * 32
        assert torch.equal(flat[start : start + 4096].cpu(), deltas["down_proj"].b[15].bfloat16())
    size = count * PAGE_BYTES * spec.num_layers
    results["load"] = {"bytes": size, "s": min(times), "queued_s": queued_s, "prepare_s": prepare_s}
    print(f"load of {size / 1e6:.0f} MB: {min(times) * 1e3:.2f} ms ({size / min(times) / 1e9:.0f} GB/s), "
          f"queued in {queued_s * 1e3:.2f} ms, laid out once in {prepare_s * 1e3:.0f} ms")  # fmt: skip


def replay_ms(launch, repeats: int = 20) -> float:
    """Median time of a captured graph of `launch`."""
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


class Base:
    """The base model's fused linears of some layers, for what adapters add beside them."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.weights = [
            [torch.empty(sum(s.outs), s.num_in, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
             for s in GROUP_SHAPES]
            for _ in range(layers)
        ]  # fmt: skip

    def run(self, step: Step, how: str) -> None:
        """how: "base", "serial" or "beside": shrink on a branch of the graph that expand joins."""
        side = torch.cuda.Stream() if how == "beside" else None
        for layer, group in itertools.product(range(self.layers), range(len(GROUPS))):
            main = torch.cuda.current_stream()
            if how == "serial":
                step.shrink(group, layer)
            if side is not None:
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    step.shrink(group, layer)
            torch.mm(step.x[group], self.weights[layer][group].T, out=step.y[group])
            if side is not None:
                main.wait_stream(side)
            if how != "base":
                step.expand(group, layer)


def row_bytes(step: Step) -> int:
    """Bytes of the rows that one layer reads, each once."""
    live = {n for _, _, n in step.segments}
    return sum(step.pool.layouts[n].used_bytes for n in live)


def measure(
    name: str, step: Step, layers: int, base: Base, results: list, hows=("base", "serial", "beside")
) -> None:
    def adapters() -> None:
        for layer, group in itertools.product(range(layers), range(len(GROUPS))):
            step.shrink(group, layer)
            step.expand(group, layer)

    scale = MODEL_LAYERS / layers
    row = {"name": name, "floor_ms": row_bytes(step) * MODEL_LAYERS / READ_BYTES_PER_S * 1e3,
           "adapters_ms": replay_ms(adapters) * scale, "plan_us": step.plan_s * 1e6}  # fmt: skip
    for how in hows:
        row[f"{how}_ms"] = replay_ms(lambda how=how: base.run(step, how)) * scale
    results.append(row)
    print(
        "  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{v:<28}" for k, v in row.items()), flush=True
    )


def per_launch(step: Step, layers: int, results: dict) -> None:
    """Time of each of the eight launches, over layers of distinct memory."""
    for group, kind in itertools.product(range(len(GROUPS)), ("shrink", "expand")):
        launch = getattr(step, kind)
        took = replay_ms(lambda g=group, f=launch: [f(g, layer) for layer in range(layers)]) / layers * 1e3
        width = GROUP_SHAPES[group].num_in if kind == "shrink" else None
        size = sum(16 * 2 * (width or SHAPES[m][0]) * len(step.segments) for m in GROUPS[group])  # rank 16
        results[f"{'/'.join(GROUPS[group])} {kind}"] = took
        print(f"  {GROUPS[group][0]:<10} {kind}: {took:6.2f} us, floor {size / READ_BYTES_PER_S * 1e6:5.2f}")


def tune(pool: Pool, layers: int, results: list, quick: bool) -> None:
    """Narrow configurations, at one row and four rows per adapter."""
    cases = [segments_of([1] * 64), segments_of([4] * 64)]
    shrinks = [(128, 2, 4), (128, 4, 4), (256, 4, 2)] + (
        [] if quick else [(128, 1, 4), (512, 4, 2), (256, 4, 3)]
    )
    expands = [(256, 4, 2), (256, 4, 1), (512, 8, 1)] + (
        [] if quick else [(128, 2, 1), (512, 4, 1), (128, 4, 1)]
    )
    for kind, table, options in (("shrink", cuda.SHRINK, shrinks), ("expand", cuda.EXPAND, expands)):
        default = table[NARROW]
        for option in options:
            table[NARROW] = cuda.Tuning(*option)
            for per_sm in (4, 8, 16):
                times = []
                for segments in cases:
                    rows = segments[-1][1]
                    step = Step(pool, segments, rows, wide=False, num_programs=per_sm * sms())
                    run = getattr(step, kind)
                    times.append(replay_ms(lambda run=run: [
                        run(g, layer) for layer in range(layers) for g in range(len(GROUPS))
                    ], 10) * MODEL_LAYERS / layers)  # fmt: skip
                results.append({"kind": kind, "tuning": option, "per_sm": per_sm, "ms": times})
                print(
                    f"  {kind} {option} x {per_sm}: {times[0]:.3f} ms at 64 rows, {times[1]:.3f} at 256",
                    flush=True,
                )
        table[NARROW] = default


def sms() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(time.time_ns() % 2**31)
    results: dict = {"device": torch.cuda.get_device_name(), "steps": [], "launches": {}, "tuning": []}
    layers = 4 if options.quick else 8
    check_all(results)
    check_load(results)
    pool, base = Pool(uniform(64, 16), layers, torch.bfloat16), Base(layers)
    print(f"all figures for {MODEL_LAYERS} layers, from {layers}")
    cases = {
        "64 adapters, 64 rows": segments_of([1] * 64),
        "64 adapters, 256 rows": segments_of([4] * 64),
        "64 Zipf, 256 rows": zipf(64, 256),
        "1 adapter, 1 row": segments_of([1]),
        "1 adapter, 64 rows": segments_of([64]),
        "1 adapter, 256 rows": segments_of([256]),
    }
    for pdl in (False, True):
        for name, segments in cases.items():
            step = Step(pool, segments, segments[-1][1], wide=False, pdl=pdl)
            hows = ("serial",) if pdl else ("base", "serial", "beside")
            measure(name + (", PDL" if pdl else ""), step, layers, base, results["steps"], hows)
    empty = Step(pool, [], 64, wide=False)
    measure("no adapter, 64 rows", empty, layers, base, results["steps"])
    per_launch(Step(pool, segments_of([1] * 64), 64, wide=False), layers, results["launches"])
    for name, counts in (("1 adapter, 8192 tokens", [8192]), ("8 adapters, 8192 tokens", [1024] * 8)):
        step = Step(pool, segments_of(counts), 8192, wide=True)
        measure(name, step, layers, base, results["steps"], ("base", "serial"))
    tune(pool, layers, results["tuning"], options.quick)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
