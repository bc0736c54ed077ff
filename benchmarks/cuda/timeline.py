"""Where the seconds of a workload go, step by step: what each held and how long it took.

    python -m benchmarks.cuda.timeline G4 [--runs 2]

Prints, for the last run: the time before the first step, then equal steps in a row as one line (steps of the
same kind, mean and largest milliseconds, tokens), and what is left at the end. Random weights.
"""

from __future__ import annotations

import argparse
import time
from itertools import groupby

from benchmarks.cuda import workloads
from benchmarks.cuda.pieces import Bench, Setup
from polybatch.bench.workloads import Workload
from polybatch.request import SamplingParams


def run(bench: Bench, workload: Workload) -> tuple[float, list[tuple[str, int, float]], float]:
    """Seconds to queue everything; (kind, tokens, seconds) of every step; seconds of all."""
    bench.register(workload.adapters)
    core = bench.llm.core
    start = time.perf_counter()
    for index, request in enumerate(workload.requests):
        params = SamplingParams(max_tokens=request.max_tokens, temperature=0, ignore_eos=True)
        core.add_request(str(index), list(request.token_ids), params, request.adapter)
    queued = before = time.perf_counter()
    steps = []
    newest = max((record.index for record in core.step_log.steps_after(-1)), default=-1)
    while core.has_work():
        core.step()
        now = time.perf_counter()
        for record in core.step_log.steps_after(newest):
            newest = record.index
            decode, prefill = sum(record.decode.values()), sum(record.prefill.values())
            kind = "decode" if not prefill else "prefill" if not decode else "mixed"
            steps.append((f"{kind}, {record.num_seqs} sequences", decode + prefill, now - before))
        before = now
    return queued - start, steps, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=workloads.NAMES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="random:llama-3.1-8b")
    parser.add_argument("--memory", default="48GiB")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--shrink", type=int, default=1)
    arguments = parser.parse_args()
    bench = Bench(
        Setup(model=arguments.model, device=arguments.device, memory=arguments.memory), ceilings=None
    )
    try:
        vocab_size = bench.llm.spec.vocab_size
        for number in range(arguments.runs):
            workload = workloads.make(arguments.workload, number, vocab_size, arguments.shrink)
            queue_s, steps, total_s = run(bench, workload)
            print(f"run {number}: {1000 * queue_s:.1f} ms to queue, {total_s:.3f} s in all", flush=True)
        for kind, group in groupby(steps, key=lambda step: step[0]):
            alike = list(group)
            times = [1000 * seconds for _, _, seconds in alike]
            print(
                f"{len(alike):4} x {kind:<28} {alike[0][1]:6} tokens  "
                f"mean {sum(times) / len(times):8.2f} ms  largest {max(times):8.2f} ms  "
                f"together {sum(times):8.1f} ms"
            )
    finally:
        bench.close()


if __name__ == "__main__":
    main()
