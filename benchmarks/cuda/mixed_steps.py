"""Mixed steps as captured graphs beside the same steps launched kernel by kernel.

    python -m benchmarks.cuda.mixed_steps [--json FILE]

Claim: both give the same logits, but for the order of sums of padded products, and a graph is slower by its
padding at most while it spares the host the launches. Llama-3.1-8B's shape, random weights: 8 rows decode
behind 512 tokens beside one prompt of the rest of the step; without adapters, with one of rank 16 for all,
and with rows without adapter beside five of ranks 8 to 64. Medians of the wall time of steps, each waited
for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda.parallel_check import Hand, relative
from polybatch.adapters.weights import AdapterWeights, ModuleDelta
from polybatch.execution.cuda import CudaExecutor
from polybatch.models.random_weights import open_random

DECODES, CONTEXT = 8, 512
SIZES = (16, 64, 100, 192, 300, 512, 800, 1024, 1500, 2048)
REPEATS = 7


def adapters(executor: CudaExecutor, ranks: tuple[int, ...]) -> list[AdapterWeights]:
    """Random ones on all linear layers; layers share memory, which their pages do not."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number, rank in enumerate(ranks):
        layer = {
            module: ModuleDelta(
                torch.randn(rank, into, generator=generator) * into**-0.5,
                torch.randn(rank, out, generator=generator) * rank**-0.5,
            )
            for module, (out, into) in executor.spec.linear_shapes.items()
        }
        made.append(AdapterWeights(f"{number} of {ranks}", (layer,) * executor.spec.num_layers))
    return made


def step(executor: CudaExecutor, size: int, held: list[AdapterWeights | None]) -> tuple[torch.Tensor, float]:
    """Logits of the last repeat, median seconds of all."""
    hand, decodes = Hand(executor), min(DECODES, size - 2)
    rows = [hand.sequence(CONTEXT, i, held[i % len(held)], 2 + REPEATS) for i in range(decodes)]
    prompts = [hand.sequence(size - decodes, 50, held[-1]) for _ in range(2)]
    seconds: list[float] = []
    for repeat in range(REPEATS):
        prompt = prompts[repeat % 2]
        prompt.num_computed = 0
        for seq in rows:
            seq.num_computed = len(seq.tokens) - 1
        began = time.perf_counter()
        logits = hand.forward([*((seq, 1) for seq in rows), (prompt, size - decodes)])
        seconds.append(time.perf_counter() - began)
    hand.release([*rows, *prompts])
    return logits, statistics.median(seconds[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to put the figures")
    args = parser.parse_args()
    weights, _ = open_random("llama-3.1-8b", device="cuda:0")
    executor = CudaExecutor(
        weights, device="cuda:0", num_pages=20000, max_num_tokens=8192, max_num_seqs=256, max_model_len=8192
    )
    print(executor.describe()["start-up"], executor.describe()["graphs"], flush=True)
    graphs = executor._mixed_graphs
    one = adapters(executor, (16,))
    several = adapters(executor, (8, 16, 16, 64, 32))
    mixes: dict[str, list[AdapterWeights | None]] = {
        "plain": [None], "one adapter": [*one], "six kinds": [None, *several],
    }  # fmt: skip
    figures: list[dict[str, Any]] = []
    print(f"{'rows':>6}{'adapters':>14}{'graph ms':>10}{'single ms':>11}{'ratio':>7}{'error':>10}")
    for name, held in mixes.items():
        for size in SIZES:
            found = []
            for ladder in (graphs, None):
                executor._mixed_graphs = ladder
                found.append(step(executor, size, held))
            (graph, graph_s), (single, single_s) = found
            error = relative(graph, single)
            figures.append({
                "rows": size, "adapters": name, "graph_ms": 1000 * graph_s, "single_ms": 1000 * single_s,
                "relative_error": error,
            })  # fmt: skip
            print(f"{size:>6}{name:>14}{1000 * graph_s:>10.2f}{1000 * single_s:>11.2f}"
                  f"{single_s / graph_s:>7.2f}{error:>10.1e}", flush=True)  # fmt: skip
    if args.json:
        document = {
            "device": torch.cuda.get_device_name(0), "torch": torch.__version__,
            "command": "python -m benchmarks.cuda.mixed_steps", "steps": figures,
        }  # fmt: skip
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return int(max(figure["relative_error"] for figure in figures) > 6e-2)


if __name__ == "__main__":
    raise SystemExit(main())
