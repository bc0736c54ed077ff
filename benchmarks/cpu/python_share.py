"""Python's share of a step: scheduling, laying out, sampling and bookkeeping against the forward pass.

    python -m benchmarks.cpu.python_share --batch 64 --out benchmarks/results/cpu/python_share.json

Runs the offline batch W2 with as many requests as `--batch` and reads the times that the engine keeps by
phase. "Forward" holds the kernels and the laying out of arrays for them; the latter is timed apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from polybatch import LLM, SamplingParams
from polybatch.bench import meter, results, workloads
from polybatch.execution.cpu_step import StepArrays


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    filling = _watch_filling()
    found = []
    with LLM(
        arguments.model, dtype=arguments.dtype, quantization=arguments.quantization, max_model_len=512,
        max_num_seqs=arguments.batch,
    ) as llm:  # fmt: skip
        for run in range(arguments.runs + 1):
            filling.clear()
            found.append(_shares(llm, arguments.batch, run, filling))
    kept = sorted(found[1:], key=lambda shares: shares["python"])[arguments.runs // 2]
    for name, value in kept.items():
        print(f"{name:18} {value}")
    if arguments.out:
        document = {
            "command": "python -m benchmarks.cpu.python_share " + " ".join(argv or sys.argv[1:]),
            "machine": meter.as_dict(meter.machine()),
            "median": kept,
            "runs": found[1:],
        }
        results.write(arguments.out, document)
    print(json.dumps({"python_share": kept["python"]}))


def _shares(llm: LLM, batch: int, run: int, filling: list[float]) -> dict[str, Any]:
    """One run of the workload; the first warms up."""
    requests = workloads.make("W2", run, llm.spec.vocab_size, batch).requests
    before = llm.stats().times
    llm.generate(
        [list(request.token_ids) for request in requests],
        [
            SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True)
            for request in requests
        ],
    )
    after = llm.stats().times
    spent = {
        name: getattr(after, name) - getattr(before, name)
        for name in ("plan_s", "forward_s", "sample_s", "commit_s", "output_s")
    }
    spent["layout_s"] = sum(filling)
    spent["forward_s"] -= spent["layout_s"]
    total = sum(spent.values())
    shares = {name: round(seconds, 4) for name, seconds in spent.items()}
    return shares | {"steps": after.num_steps - before.num_steps,
                     "python": round(1 - spent["forward_s"] / total, 4)}  # fmt: skip


def _watch_filling() -> list[float]:
    """Seconds that laying out each step's arrays takes, from now on."""
    spent: list[float] = []
    fill = StepArrays.fill

    def timed(self: StepArrays, *args: Any, **options: Any) -> None:
        start = time.perf_counter()
        fill(self, *args, **options)
        spent.append(time.perf_counter() - start)

    StepArrays.fill = timed  # type: ignore[method-assign]
    return spent


if __name__ == "__main__":
    main()
