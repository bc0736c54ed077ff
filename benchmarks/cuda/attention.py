"""Ragged attention on one GPU: right against float64, then timed beside what the card could do at best.

    python -m benchmarks.cuda.attention [--quick] [--checks-only] [--out FILE]

Claim: decode reads keys and values at no less than 85 % of the card's read bandwidth (90 % at 256 sequences),
merging included; a prefix shared by 256 sequences is read once. Shapes are Llama-3.1-8B's. Each time is the
mean over a graph of launches on different layers' pages, more of them than the cache holds. Checks run
before any timing, in processes of their own, which compile all variants side by side.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polybatch.kernels.ragged_attention import cuda
from polybatch.kernels.ragged_attention import ragged_attention as reference
from polybatch.kernels.ragged_attention.work import (
    Heads,
    PrefixGroup,
    Tile,
    Tiles,
    arrays,
    fill,
    make_limits,
)

PAGE = 16
LLAMA = Heads(32, 8, 128)
READ_GB_S, TFLOP_S = 3090.0, 749.0
DEVICE = "cuda"
NUM_SMS = 132
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


@dataclass(frozen=True)
class Step:
    """chunks: (context, new). prefix: tokens that the first `members` chunks share."""

    name: str
    chunks: list[tuple[int, int]]
    prefix: int = 0
    members: int = 0
    window: int | None = None

    @property
    def num_tokens(self) -> int:
        return sum(new for _, new in self.chunks)

    def kv_tokens(self) -> int:
        """Tokens whose keys and values a step must read at least once."""
        return sum(context + new for context, new in self.chunks) - self.prefix * max(0, self.members - 1)

    def flop(self, heads: Heads) -> float:
        pairs = sum(new * context + new * (new + 1) / 2 for context, new in self.chunks)
        return 4.0 * pairs * heads.num_heads * heads.head_dim


class Setup:
    """A step's plan and memory on the device, ready to launch on any of `num_layers` layers."""

    def __init__(
        self,
        step: Step,
        heads: Heads,
        dtype: torch.dtype,
        *,
        num_layers: int = 1,
        poison: bool = False,
        seed: int = 0,
        arena: torch.Tensor | None = None,
    ) -> None:
        self.step, self.heads, self.dtype, self.num_layers = step, heads, dtype, num_layers
        self.counts = np.array([new for _, new in step.chunks])
        self.kv_lens = np.array([context + new for context, new in step.chunks])
        pages = -(-self.kv_lens // PAGE)
        shared = step.prefix // PAGE
        owned = pages - np.where(np.arange(len(pages)) < step.members, shared, 0)
        self.num_pages = int(owned.sum()) + shared + 1
        order = np.random.default_rng(seed).permutation(self.num_pages).astype(np.int32)
        self.table = np.full((len(pages), int(pages.max()) + 1), 2**24, dtype=np.int32)
        at = shared
        for s, count in enumerate(owned):
            first = pages[s] - count
            self.table[s, :first] = order[:first]
            self.table[s, first : pages[s]] = order[at : at + count]
            at += count
        size = 2 * heads.num_kv_heads * PAGE * heads.head_dim
        torch.manual_seed(seed)
        if arena is None:
            arena = torch.randn(num_layers, self.num_pages, size, device=DEVICE, dtype=dtype)
        self.arena = arena
        if poison:
            self._poison(pages)
        q_size = heads.num_heads * heads.head_dim
        self.qkv = torch.randn(step.num_tokens, q_size * 3 // 2, device=DEVICE, dtype=dtype)
        self.q = self.qkv[:, :q_size].unflatten(1, (heads.num_heads, heads.head_dim))
        self.out = torch.full((step.num_tokens, q_size), torch.nan, device=DEVICE, dtype=dtype)
        starts = np.repeat(self.kv_lens - self.counts, self.counts)
        firsts = np.cumsum(self.counts) - self.counts
        positions = starts + np.arange(step.num_tokens) - np.repeat(firsts, self.counts)
        self.firsts = firsts
        self.positions = torch.from_numpy(positions.astype(np.int32)).to(DEVICE)
        self.table_gpu = torch.from_numpy(self.table).to(DEVICE)

    def _poison(self, pages: np.ndarray) -> None:
        """NaN in every slot that no sequence holds."""
        held = torch.zeros(self.num_pages, PAGE, dtype=torch.bool)
        for s, kv_len in enumerate(self.kv_lens):
            for j in range(pages[s]):
                held[self.table[s, j], : min(PAGE, kv_len - j * PAGE)] = True
        view = self.view(0)
        view.masked_fill_(~held.to(DEVICE)[:, None, None, :, None], torch.nan)

    def view(self, layer: int) -> torch.Tensor:
        shape = (self.num_pages, 2, self.heads.num_kv_heads, PAGE, self.heads.head_dim)
        return self.arena[layer].view(shape)

    def launcher(
        self, tiles: Tiles, *, is_dependent: bool = True, at_capacity: bool = False
    ) -> Callable[[int], None]:
        """launch(layer) under a configuration; at_capacity: as a graph does, which knows no plan."""
        step = self.step
        limits = make_limits(
            self.heads,
            tiles,
            max_tokens=step.num_tokens,
            max_seqs=len(step.chunks),
            num_sms=NUM_SMS,
            max_group_tokens=None if at_capacity else step.members * 16,
        )
        views = {name: np.zeros(shape, dtype) for name, (shape, dtype) in arrays(limits).items()}
        groups = [PrefixGroup(0, step.prefix, np.arange(step.members))] if step.members else []
        work = fill(
            views, self.heads, tiles,
            first_tokens=self.firsts, num_new=self.counts, kv_lens=self.kv_lens, num_sms=NUM_SMS,
            max_partials=limits.max_partials, groups=groups, window=step.window,
        )  # fmt: skip
        device = {name: torch.from_numpy(view).to(DEVICE) for name, view in views.items()}
        scratch = cuda.make_scratch(self.heads, limits, DEVICE)
        num_narrow = limits.max_narrow if at_capacity else work.num_narrow
        num_wide = limits.max_wide if at_capacity and work.has_wide else work.num_wide

        def launch(layer: int) -> None:
            cuda.ragged_attention(
                self.q, self.out, self.arena[layer], self.table_gpu, self.positions, device, scratch,
                self.heads, tiles, scale=self.heads.head_dim**-0.5, page_size=PAGE, window=step.window,
                max_narrow=num_narrow, max_wide=num_wide, is_dependent=is_dependent,
                is_decode=limits.is_decode, num_sms=NUM_SMS,
            )  # fmt: skip

        return launch


def error(setup: Setup, tiles: Tiles) -> float:
    """Relative error in norm against float64; NaN where an output was not written."""
    launch = setup.launcher(tiles)
    queries = setup.qkv.clone()
    worst = 0.0
    cu_tokens = torch.tensor([0, *np.cumsum(setup.counts).tolist()], dtype=torch.int32)
    expected, _ = reference(
        setup.q, setup.view(0), setup.table_gpu.clamp(max=setup.num_pages - 1), cu_tokens,
        torch.from_numpy(setup.kv_lens), scale=setup.heads.head_dim**-0.5, window=setup.step.window,
        accumulate=torch.float64,
    )  # fmt: skip
    for _ in range(3):  # a race would move the error from launch to launch
        setup.out.fill_(torch.nan)
        setup.qkv.fill_(torch.nan)
        setup.qkv.copy_(queries)  # the kernel before, whose end a launch has to wait for
        launch(0)
        ours = setup.out.double().view(expected.shape)
        worst = max(worst, float((ours - expected).norm() / expected.norm()))
        if not bool(ours.isfinite().all()):
            return float("nan")
    return worst


def check_steps(seed: int) -> list[Step]:
    rng = np.random.default_rng(seed)
    ragged = [(int(rng.integers(0, 600)), int(rng.integers(1, 90))) for _ in range(12)]
    decode = [(int(rng.integers(0, 900)), 1) for _ in range(21)]
    verify = [(int(rng.integers(0, 900)), 5) for _ in range(9)]
    group = [(512 + int(rng.integers(0, 200)), 1 + i % 3) for i in range(37)]
    return [
        Step("ragged", ragged + decode + verify),
        Step("window", ragged + decode, window=100),
        Step("group", group + decode, 512, 37),
        Step("one long", [(30000, 1)]),
    ]


CHECKED = [
    (LLAMA, torch.bfloat16),
    (LLAMA, torch.float16),
    (LLAMA, torch.float32),
    (Heads(9, 3, 64), torch.bfloat16),
    (Heads(9, 3, 64), torch.float32),
    (Heads(14, 2, 64), torch.bfloat16),
    (Heads(32, 32, 80), torch.bfloat16),
    (Heads(8, 8, 96), torch.float16),
    (Heads(16, 1, 128), torch.bfloat16),
    (Heads(8, 4, 256), torch.bfloat16),
]

BASE = Tiles()
NARROW = {
    "64x3 r128": Tile(16, 64, programs_per_sm=3, max_registers=128),
    "64x3 r128 pf": Tile(16, 64, programs_per_sm=3, max_registers=128, prefetch=True),
    "64x3": Tile(16, 64, programs_per_sm=3),
    "64x2 r128 pf": Tile(16, 64, num_stages=2, programs_per_sm=4, max_registers=128, prefetch=True),
    "32x4 pf": Tile(16, 32, num_stages=4, programs_per_sm=4, max_registers=128, prefetch=True),
    "32x4": Tile(16, 32, num_stages=4, programs_per_sm=4, max_registers=128),
}
WIDE = {
    "128x64x3 r168": Tile(128, 64, num_warps=8, programs_per_sm=1, max_registers=168),
    "128x64x3": Tile(128, 64, num_warps=8, programs_per_sm=1),
    "128x64x2 r128": Tile(128, 64, num_warps=8, num_stages=2, max_registers=128),
    "128x32x3 r128": Tile(128, 32, num_warps=8, max_registers=128),
    "64x64x3": Tile(64, 64),
    "64x64x2": Tile(64, 64, num_stages=2),
    "64x32x3 r168": Tile(64, 32, programs_per_sm=3, max_registers=168),
}
DECODE_CONFIGS = {name: replace(BASE, narrow=tile) for name, tile in NARROW.items()} | {
    "64x3 r128 after": replace(BASE, narrow=NARROW["64x3 r128"]),
    "64x3 pf parts of 128": replace(BASE, narrow=NARROW["64x3 r128 pf"], min_part_keys=128),
    "64x3 pf parts of 256": replace(BASE, narrow=NARROW["64x3 r128 pf"], min_part_keys=256),
}
PREFILL_CONFIGS = {name: replace(BASE, wide=tile) for name, tile in WIDE.items()}


def _both(wide: str, narrow: str, per_sm: int) -> Tiles:
    """Cut the wide items for so many programs on an SM, to leave room for narrow ones."""
    return replace(BASE, wide=replace(WIDE[wide], programs_per_sm=per_sm), narrow=NARROW[narrow])


MIXED_CONFIGS = {
    "128x64x3 r168, 64x3": _both("128x64x3 r168", "64x3 r128", 1),
    "128x64x3 r168, 64x3 pf": _both("128x64x3 r168", "64x3 r128 pf", 1),
    "128x64x3 r168, 64x3 after": _both("128x64x3 r168", "64x3 r128", 1),
    "128x64x3 r168, 64x2 pf": _both("128x64x3 r168", "64x2 r128 pf", 1),
    "128x64x3, 64x3 pf": _both("128x64x3", "64x3 r128 pf", 1),
    "128x32x3 1/SM, 64x3 pf": _both("128x32x3 r128", "64x3 r128 pf", 1),
    "128x32x3 1/SM, 64x2 pf": _both("128x32x3 r128", "64x2 r128 pf", 1),
    "128x32x3 2/SM, 64x3 pf": _both("128x32x3 r128", "64x3 r128 pf", 2),
    "64x64x2 1/SM, 64x2 pf": _both("64x64x2", "64x2 r128 pf", 1),
    "64x64x2 2/SM, 64x2 pf": _both("64x64x2", "64x2 r128 pf", 2),
    "64x64x3 2/SM, 64x3 pf": _both("64x64x3", "64x3 r128 pf", 2),
}
RNG = np.random.default_rng(1)
UNEVEN = [(int(n), 1) for n in RNG.integers(64, 960, 64)]
DECODE = [
    *(Step(f"decode {b} x 512", [(511, 1)] * b) for b in (1, 8, 32, 64, 128, 256)),
    Step("decode 64 x 64..960", UNEVEN),
    Step("decode 4 x 32k", [(32767, 1)] * 4),
    Step("decode 1 x 32k", [(32767, 1)]),
    Step("decode 256 x 2112", [(2111, 1)] * 256),
]
PREFILL = [Step("prefill 16 x 512", [(0, 512)] * 16), Step("prefill 1 x 8192", [(0, 8192)])]
MIXED = [
    Step("prefix 256 x (2048 + 64)", [(2111, 1)] * 256, 2048, 256),
    Step("verify 64 x 5 of 512", [(507, 5)] * 64),
    Step("200 decode + 512 prefill", [(511, 1)] * 200 + [(512, 512)]),
]
QUICK = ("decode 1 x 512", "decode 64 x 512", "decode 64 x 64..960", "decode 256 x 512", "decode 4 x 32k")


def run_check(task: tuple[str, Any]) -> tuple[str, float, float]:
    """In a process of its own: ("shape", index), or ("tiles", tiles), which also fills the disk's cache."""
    kind, what = task
    if kind == "shape":
        heads, dtype = CHECKED[what]
        name, tiles, seed = f"{heads} {dtype}", cuda.choose_tiles(heads, dtype), what
    else:
        heads, dtype = LLAMA, torch.bfloat16
        name, tiles, seed = str(what), what, 3
    steps = check_steps(seed)
    if kind == "tiles":
        steps = [steps[0], steps[2], Step("decode", [(100, 1)] * 4)]
    errors = [error(Setup(step, heads, dtype, poison=True, seed=seed), tiles) for step in steps]
    worst = float("nan") if any(e != e for e in errors) else max(errors)
    return name, worst, TOLERANCE[dtype]


def time_step(setup: Setup, tiles: Tiles, *, is_dependent: bool = True, at_capacity: bool = False) -> float:
    """Seconds of one layer's launches: the median of graph replays over all layers."""
    launch = setup.launcher(tiles, is_dependent=is_dependent, at_capacity=at_capacity)
    repeats = max(1, 16 // setup.num_layers)
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for layer in range(setup.num_layers):
                launch(layer)
    times = []
    for i in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i > 1:
            times.append(start.elapsed_time(end) * 1e-3 / (repeats * setup.num_layers))
    return float(np.median(times))


def time_all(steps: list[Step], configs: dict[str, Tiles]) -> list[dict[str, Any]]:
    rows = []
    for step in steps:
        kv_bytes = step.kv_tokens() * 2 * LLAMA.num_kv_heads * LLAMA.head_dim * 2
        layers = int(min(64, max(2, 2e8 // kv_bytes + 1)))
        setup = Setup(step, LLAMA, torch.bfloat16, num_layers=layers)
        floor = max(kv_bytes / READ_GB_S / 1e9, step.flop(LLAMA) / TFLOP_S / 1e12)
        for name, tiles in configs.items():
            try:
                seconds = time_step(setup, tiles, is_dependent=not name.endswith("after"))
            except Exception as failure:  # noqa: BLE001 a variant that does not fit must not end the run
                print(f"{step.name:28} {name:26} failed: {str(failure)[:120]}", flush=True)
                continue
            row = {
                "step": step.name,
                "config": name,
                "us": seconds * 1e6,
                "floor_us": floor * 1e6,
                "gb_s": kv_bytes / seconds / 1e9,
                "tflop_s": step.flop(LLAMA) / seconds / 1e12,
            }
            rows.append(row)
            print(
                f"{step.name:28} {name:26} {row['us']:9.1f} us {row['gb_s']:7.0f} GB/s "
                f"{row['tflop_s']:6.0f} TFLOP/s {floor / seconds:6.1%} of the floor",
                flush=True,
            )
        del setup
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and variants")
    parser.add_argument("--checks-only", action="store_true")
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    options = parser.parse_args()
    decode = [step for step in DECODE if not options.quick or step.name in QUICK]
    tasks: list[tuple[str, Any]] = [("shape", i) for i in range(len(CHECKED))]
    configs = DECODE_CONFIGS | PREFILL_CONFIGS | MIXED_CONFIGS
    if not options.checks_only:
        # What differs in how items are cut alone is compiled alike.
        compiled = {
            (replace(tiles.narrow, programs_per_sm=1), replace(tiles.wide, programs_per_sm=1)): tiles
            for tiles in configs.values()
        }
        tasks += [("tiles", tiles) for tiles in compiled.values()]
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        checks = pool.map(run_check, tasks, chunksize=1)
    wrong = [c for c in checks if not c[1] < c[2]]
    for name, worst, limit in checks:
        print(f"{'WRONG' if not worst < limit else 'right'} {worst:.2e} < {limit:.0e} {name[:120]}")
    if wrong:
        raise SystemExit("not timed: some results are wrong")
    rows: list[dict[str, Any]] = []
    if not options.checks_only:
        rows = time_all(decode, DECODE_CONFIGS) + time_all(PREFILL, PREFILL_CONFIGS)
        rows += time_all(MIXED, MIXED_CONFIGS)
    result = {
        "device": torch.cuda.get_device_name(0),
        "checks": [{"name": c[0], "error": c[1], "limit": c[2]} for c in checks],
        "configs": {name: asdict(tiles) for name, tiles in configs.items()},
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))
    print(json.dumps({"right": len(checks), "timed": len(rows)}))


if __name__ == "__main__":
    main()
