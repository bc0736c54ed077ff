"""Decode steps that share a prefix, under candidates for `Tiles.shared`: right against float64, then timed.

    python -m benchmarks.cuda.attention_prefix [--out FILE]

Claim: 256 rows that share 2,048 tokens take no longer for it than reading their own tokens does. Times are of
one layer of Llama-3.1-8B's shape, `exact` with a program for every item, `graph` with the room of a captured
step. Two steps tell what the whole is made of: the prefix with one token of each row's own, and those tokens
without a prefix. Steps that none of this should change are timed last, under the default.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import argparse
import json
import multiprocessing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.cuda.attention import LLAMA, READ_GB_S, TOLERANCE, Setup, Step, time_step
from polybatch.kernels.ragged_attention import cuda
from polybatch.kernels.ragged_attention import ragged_attention as reference
from polybatch.kernels.ragged_attention.work import SharedTiles, Tile, Tiles

BASE = Tiles(shared=None)
NARROW = {
    "4 warps": cuda.SHARED.narrow,
    "1 warp r128": Tile(16, 32, num_warps=1, num_stages=2, programs_per_sm=10, max_registers=128),
    "1 warp r160": Tile(16, 32, num_warps=1, num_stages=2, programs_per_sm=10, max_registers=160),
    "1 warp r160 pf": Tile(16, 32, 1, 2, 10, max_registers=160, prefetch=True),
    "1 warp x3 r168": Tile(16, 32, num_warps=1, num_stages=3, programs_per_sm=6, max_registers=168),
}
PIPELINED = {
    "beside": None,  # narrow programs on the multiprocessors of wide ones
    "64x4": Tile(128, 64, num_stages=4),
    "64x3": Tile(128, 64, num_stages=3),
    "128x3": Tile(128, 128, num_stages=3),
}
PAIRS = [
    ("beside", "4 warps"),
    ("beside", "1 warp r128"),
    *(("64x4", narrow) for narrow in NARROW),
    ("64x3", "1 warp r160"),
    ("128x3", "1 warp r160"),
]
ONE_WARP = replace(NARROW["1 warp r160"], programs_per_sm=4)
CONFIGS = {"none": BASE, "none, 1 warp": replace(BASE, narrow=ONE_WARP)} | {
    f"{wide}, {narrow}": replace(BASE, shared=SharedTiles(NARROW[narrow], cuda.SHARED.wide, PIPELINED[wide]))
    for wide, narrow in PAIRS
}
OWN = np.random.default_rng(4).integers(0, 128, 256)
CHECKS = [
    Step(
        "40 of 60 share 512", [(512 + int(n), 1) for n in OWN[:40]] + [(int(n), 1) for n in OWN[:20]], 512, 40
    ),
    Step("256 share 2048", [(2048 + int(n), 1) for n in OWN], 2048, 256),
    Step("in a window", [(512 + int(n), 1) for n in OWN[:60]], 512, 60, window=300),
]
SHARED = [
    Step(f"prefix {members} x ({prefix} + {own})", [(prefix + own - 1, 1)] * members, prefix, members)
    for prefix, own, members in (
        *((2048, own, 256) for own in (64, 96, 128, 32, 1)),
        *((2048, 96, members) for members in (128, 64, 12)),
        (8192, 96, 256),
        (4096, 32, 256),
        (512, 96, 256),
    )
]
UNCHANGED = [
    Step("decode 256 x 96", [(95, 1)] * 256),
    Step("decode 256 x 512", [(511, 1)] * 256),
    Step("decode 64 x 512", [(511, 1)] * 64),
    Step("decode 64 x 1024", [(1023, 1)] * 64),
    Step("prefill 8 x 1024", [(0, 1024)] * 8),
    Step("prefill 16 x 512", [(0, 512)] * 16),
    Step("prefill 1 x 8192", [(0, 8192)]),
    Step("200 decode + 512 prefill", [(511, 1)] * 200 + [(512, 512)]),
]
# Microseconds in benchmarks/results/cuda/attention.json, of the same tiles.
BEFORE = {
    "decode 256 x 512": 186.1, "decode 64 x 512": 49.4, "prefill 16 x 512": 149.9, "prefill 1 x 8192": 1204.3
}  # fmt: skip


def worst_error(setup: Setup, expected: torch.Tensor, tiles: Tiles, *, at_capacity: bool) -> float:
    """Relative error in norm of layer 0, launched after layer 1, whose parts differ; NaN if not written."""
    launch = setup.launcher(tiles, at_capacity=at_capacity)
    worst = 0.0
    for _ in range(3):
        setup.out.fill_(torch.nan)
        for _ in range(3):
            launch(1)
            launch(0)
        ours = setup.out.double().view(expected.shape)
        if not bool(ours.isfinite().all()):
            return float("nan")
        worst = max(worst, float((ours - expected).norm() / expected.norm()))
    return worst


def check(name: str) -> tuple[str, float]:
    """The worst error of a configuration, in a process of its own, which leaves its kernels on the disk."""
    errors = []
    for seed, step in enumerate(CHECKS):
        setup = Setup(step, LLAMA, torch.bfloat16, num_layers=2, poison=True, seed=seed)
        starts = torch.arange(step.num_tokens + 1, dtype=torch.int32)
        expected, _ = reference(
            setup.q, setup.view(0), setup.table_gpu.clamp(max=setup.num_pages - 1), starts,
            torch.from_numpy(setup.kv_lens), scale=LLAMA.head_dim**-0.5, window=step.window,
            accumulate=torch.float64,
        )  # fmt: skip
        for at_capacity in (False, True):
            errors.append(worst_error(setup, expected, CONFIGS[name], at_capacity=at_capacity))
    return name, float("nan") if any(e != e for e in errors) else max(errors)


def time_all(steps: list[Step], names: list[str]) -> list[dict[str, float | str]]:
    """Microseconds of every step under every configuration, at exactly its items and as a graph has them."""
    rows: list[dict[str, float | str]] = []
    for step in steps:
        kv_bytes = step.kv_tokens() * 2 * LLAMA.num_kv_heads * LLAMA.head_dim * 2
        setup = Setup(step, LLAMA, torch.bfloat16, num_layers=int(min(64, max(2, 2e8 // kv_bytes + 1))))
        for name in names:
            exact = time_step(setup, CONFIGS[name])
            graph = time_step(setup, CONFIGS[name], at_capacity=True)
            row: dict[str, float | str] = {"step": step.name, "config": name, "us": exact * 1e6}
            row |= {"graph_us": graph * 1e6, "read_us": kv_bytes / READ_GB_S / 1e3}
            rows.append(row)
            print(
                f"{step.name:26} {name:22} exact {row['us']:7.1f} graph {row['graph_us']:7.1f} us, "
                f"reads alone {row['read_us']:6.1f}, {step.flop(LLAMA) / exact / 1e12:4.0f} TFLOP/s"
                + (f", before {BEFORE[step.name]:.1f}" if step.name in BEFORE else ""),
                flush=True,
            )
        del setup
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    options = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(len(CONFIGS)) as pool:
        checks = dict(pool.map(check, CONFIGS, chunksize=1))
    limit = TOLERANCE[torch.bfloat16]
    right = [name for name, worst in checks.items() if worst < limit]
    for name, worst in checks.items():
        print(f"{'right' if name in right else 'WRONG'} {worst:.2e} < {limit:.0e} {name}", flush=True)
    rows = time_all(SHARED, right) + time_all(UNCHANGED, ["none", "none, 1 warp"])
    if options.out:
        configs = {name: asdict(tiles) for name, tiles in CONFIGS.items()}
        device = torch.cuda.get_device_name(0)
        result = {"device": device, "checks": checks, "configs": configs, "rows": rows}
        options.out.write_text(json.dumps(result, indent=1))
    if len(right) < len(checks):
        raise SystemExit("some results are wrong; those configurations were not timed")


if __name__ == "__main__":
    main()
