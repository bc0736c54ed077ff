"""What an adapter's load costs the host, and how fast it is, at the shape of an 8B Llama.

Claims: a load takes the engine's thread less than 1 ms at any rank; bytes move at the speed of the bus; a
thousand adapters are registered in seconds. Before anything is timed, whole pages are compared with the
host's rows, after loads out of windows of one pinned buffer, memory packed by the pool, and pageable memory.

    python -m benchmarks.cuda.adapter_loads [--quick] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.cuda.adapters import RandomAdapters
from polybatch.adapters import pack as packing
from polybatch.adapters.store import AdapterStore
from polybatch.adapters.weights import AdapterWeights, ModuleDelta
from polybatch.config import ModelSpec, RopeSpec
from polybatch.execution import cuda_adapters
from polybatch.execution.cuda_adapters import CudaAdapters

SPEC = ModelSpec(
    family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, max_position=8192, rms_norm_eps=1e-5, rope=RopeSpec(),
)  # fmt: skip
SHAPES = SPEC.linear_shapes
PAGE_BYTES = 65536
RANKS = (8, 16, 64)
NUM_PAGES = 640
DTYPE = torch.bfloat16


def expected_pages(weights: AdapterWeights, adapters: CudaAdapters, before: int) -> torch.Tensor:
    """The adapter's pages in all layers, [layers, pages * PAGE_BYTES], where every other byte is `before`."""
    layout = adapters._adapters[weights.digest].shape.layout
    size = DTYPE.itemsize
    pages = torch.full((SPEC.num_layers, layout.num_pages * PAGE_BYTES), before, dtype=torch.uint8).view(
        DTYPE
    )
    for memory, places, layer in zip(pages, layout.layers, weights.layers, strict=True):
        for module, delta in layer.items():
            at = places[module]
            for page, offset, rows in (
                (at.a_page, at.a_offset, delta.a),
                (at.b_page, at.b_offset, delta.b),
            ):
                starts = (page.astype(np.int64) * PAGE_BYTES + offset) // size
                for start, row in zip(starts.tolist(), rows, strict=True):
                    memory[start : start + len(row)] = row
    return pages.view(torch.uint8)


def check_all(arena: torch.Tensor, adapters: CudaAdapters, random: RandomAdapters) -> list[str]:
    """Loads out of every kind of host memory, one right after the other, some into pages just loaded to."""
    drawn = [
        tuple({m: ModuleDelta(torch.randn(9, i), torch.randn(9, o)) for m, (o, i) in SHAPES.items()}
              for _ in range(SPEC.num_layers))
        for _ in range(2)
    ]  # fmt: skip
    packed = adapters.pack(AdapterWeights("packed", drawn[0]))
    pageable = packing.pack(AdapterWeights("pageable", drawn[1]), DTYPE, pin=False)
    real, cuda_adapters.pack = cuda_adapters.pack, lambda weights, dtype, pin: weights
    adapters.prepare(pageable)
    cuda_adapters.pack = real
    runs = [packing.locate(weights, DTYPE).runs for weights in (packed, pageable)]
    assert all(run.is_pinned() for run in runs[0])
    assert not any(run.is_pinned() for run in runs[1])
    held = [random.make("small", 8), random.make("large", 64), packed, pageable, random.make("one", 1)]
    for weights in held:
        adapters.prepare(weights)
    arena.fill_(0xFF)
    order = np.random.default_rng(time.time_ns()).permutation(NUM_PAGES).tolist()
    placed = []
    for weights in held:
        pages = tuple(order.pop() for _ in range(adapters.pages_needed(weights)))
        placed.append((weights, pages))
    # Who is loaded last to the same pages has them, though nobody waited for the one before.
    first, (second, shared) = random.make("before", 16), placed[1]
    adapters.load(first, shared[: adapters.pages_needed(first)])
    adapters.load(second, shared)
    for weights, pages in placed:
        if weights is not second:
            adapters.load(weights, pages)
    adapters.wait([first.digest, *(weights.digest for weights in held)])
    torch.cuda.synchronize()
    assert (arena[:, order] == 0xFF).all(), "a load wrote to pages that are not its own"
    for weights, pages in placed:
        found = arena[:, list(pages)].cpu().view(SPEC.num_layers, -1)
        wanted = expected_pages(weights, adapters, 0xFF)
        found = found[:, : wanted.shape[1]]
        if weights is second:
            found = torch.where(wanted == 0xFF, wanted, found)
        assert torch.equal(found, wanted), f"{weights.digest[:12]} is not as it was on the host"
    return [weights.digest[:12] for weights in held]


def time_loads(adapters: CudaAdapters, random: RandomAdapters, rank: int, quick: bool) -> dict[str, float]:
    """Loads of distinct adapters, each awaited: host time until it is queued, and until it has arrived."""
    held = [random.make(f"{rank}, {i}", rank) for i in range(6 if quick else 20)]
    begin = time.perf_counter()
    for weights in held:
        adapters.prepare(weights)
    prepare_s = (time.perf_counter() - begin) / len(held)
    pages = tuple(range(adapters.pages_needed(held[0])))
    num_bytes = sum(x.nbytes for x in packing.stored(held[0]))
    queued, arrived, placed = [], [], []
    for weights in held:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        adapters.load(weights, pages)
        queued.append(time.perf_counter() - begin)
        adapters.wait([weights.digest])
        torch.cuda.synchronize()
        arrived.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        adapters.place([weights.digest], {weights.digest: pages})
        placed.append(time.perf_counter() - begin)
    return {
        "rank": rank, "mb": num_bytes / 1e6, "prepare_ms": prepare_s * 1e3,
        "host_ms": float(np.median(queued)) * 1e3, "host_max_ms": max(queued[1:]) * 1e3,
        "place_ms": float(np.median(placed)) * 1e3, "load_ms": float(np.median(arrived)) * 1e3,
        "gb_per_s": num_bytes / float(np.median(arrived)) / 1e9,
    }  # fmt: skip


def time_packing(adapters: CudaAdapters) -> float:
    """Seconds to pack an adapter of rank 16 from float32, each tensor of its own, as from a checkpoint."""
    layers = tuple(
        {m: ModuleDelta(torch.zeros(16, i), torch.zeros(16, o)) for m, (o, i) in SHAPES.items()}
        for _ in range(SPEC.num_layers)
    )
    begin = time.perf_counter()
    adapters.pack(AdapterWeights("from a checkpoint", layers))
    return time.perf_counter() - begin


def time_registration(adapters: CudaAdapters, random: RandomAdapters, count: int) -> float:
    store = AdapterStore(None, adapters.pages_needed, adapters.pack)
    begin = time.perf_counter()
    random.register(store, {f"registered {i}": (8, 16, 32, 64)[i % 4] for i in range(count)})
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(time.time_ns() % 2**31)
    begin = time.perf_counter()
    arena = torch.empty(SPEC.num_layers, NUM_PAGES, PAGE_BYTES, dtype=torch.uint8, device="cuda")
    adapters = CudaAdapters(SPEC, arena, DTYPE)
    random = RandomAdapters(SPEC, device="cuda")
    results: dict = {"device": torch.cuda.get_device_name(), "setup_s": time.perf_counter() - begin}
    results["checked"] = check_all(arena, adapters, random)
    print(f"checked, after {time.perf_counter() - begin:.1f} s: {', '.join(results['checked'])}", flush=True)
    results["loads"] = [time_loads(adapters, random, rank, options.quick) for rank in RANKS]
    for row in results["loads"]:
        print("  ".join(f"{name} {value:.3f}" for name, value in row.items()), flush=True)
    results["pack_s"] = time_packing(adapters)
    count = 200 if options.quick else 1000
    results["register_s"] = time_registration(adapters, random, count)
    print(
        f"packed rank 16 from float32 in {results['pack_s'] * 1e3:.0f} ms; registered {count} adapters in "
        f"{results['register_s']:.2f} s"
    )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
