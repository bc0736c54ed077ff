"""How long from a process's start to its first token, where the time goes, and how much memory a batch takes.

    python -m benchmarks.cpu.startup --runs 5 --batches 3 --out benchmarks/results/cpu/startup.json

Claim: with the model on disk and kernels compiled, the first token is there in under 4 s on an idle machine,
and W2's peak stays below that of every peer. Every run is a fresh process; precisions take turns, so that a
slow spell of the machine meets all of them. One unrecorded start per precision compiles what kernels are
missing and reads the model into the system's cache. Beside each time stands processor time, which
other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from polybatch.bench import meter, results, workloads

QUANTIZATIONS = {"bfloat16": None, "int8": "int8", "int4": "int4"}
PACKAGES = ("polybatch", "torch", "numba", "llvmlite", "tokenizers")


class _Stamps:
    """Seconds since the process started, and processor seconds, at the end of each part."""

    def __init__(self, started: float) -> None:
        self._started = started
        self.parts: dict[str, dict[str, float]] = {}
        self._last = (0.0, 0.0)

    def end(self, part: str) -> None:
        use = resource.getrusage(resource.RUSAGE_SELF)
        now = (time.monotonic() - self._started, use.ru_utime + use.ru_stime)
        self.parts[part] = {
            "wall_s": round(now[0] - self._last[0], 3),
            "processor_s": round(now[1] - self._last[1], 3),
        }
        self._last = now

    @property
    def total(self) -> dict[str, float]:
        return {"wall_s": round(self._last[0], 3), "processor_s": round(self._last[1], 3)}


def _peak_mib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def child(task: dict[str, Any]) -> dict[str, Any]:
    """One start, in the process that is measured."""
    stamps = _Stamps(task["started"])
    stamps.end("interpreter")
    import torch  # noqa: F401 - the largest part of what follows, told apart

    stamps.end("import_torch")
    from polybatch import LLM, SamplingParams

    stamps.end("import_polybatch")
    workload = workloads.make("W2", 0, workloads.SANITY_VOCAB_SIZE)
    llm = LLM(
        task["model"],
        quantization=QUANTIZATIONS[task["precision"]],
        threads=task["threads"],
        max_num_seqs=64,
        max_model_len=workload.max_model_len,
    )
    stamps.end("load")
    # Whatever else is imported by now is the benchmark's doing or a regression.
    imported = sorted({"numba", "llvmlite.binding", "transformers", "scipy"} & set(sys.modules))
    llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=1))
    stamps.end("first_token")
    peaks = {"first_token_mib": _peak_mib()}
    batch_s = []
    for run in range(task["batches"]):
        batch = workloads.make("W2", run, workloads.SANITY_VOCAB_SIZE)
        params = [
            SamplingParams(temperature=0, max_tokens=r.max_tokens, ignore_eos=True) for r in batch.requests
        ]
        begun = time.monotonic()
        llm.generate([list(r.token_ids) for r in batch.requests], params)
        batch_s.append(round(time.monotonic() - begun, 2))
    if batch_s:
        peaks["w2_mib"] = _peak_mib()
    llm.close()
    return {
        "total": stamps.total,
        "parts": stamps.parts,
        "peak": peaks,
        "batch_s": batch_s,
        "imported": imported,
    }


def start(task: dict[str, Any]) -> dict[str, Any]:
    """Run one start in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.cpu.startup", "--child"]
    task = task | {"started": time.monotonic()}
    done = subprocess.run([*command, json.dumps(task)], stdout=subprocess.PIPE, check=True, timeout=600)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and the range of the totals; the largest peak."""
    walls = [run["total"]["wall_s"] for run in runs]
    return {
        "first_token_s": statistics.median(walls),
        "range_s": [min(walls), max(walls)],
        "processor_s": statistics.median(run["total"]["processor_s"] for run in runs),
        "parts_s": {
            part: statistics.median(run["parts"][part]["wall_s"] for run in runs) for part in runs[0]["parts"]
        },
        "peak_mib": {
            key: max(run["peak"][key] for run in runs if key in run["peak"])
            for key in ("first_token_mib", "w2_mib")
            if any(key in run["peak"] for run in runs)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.startup", description=__doc__)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--precisions", default="bfloat16,int8")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batches", type=int, default=3, help="batches of W2 in the last run of each")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--no-wait", action="store_true", help="do not wait for an idle machine")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return
    task = {"model": arguments.model, "threads": arguments.threads, "batches": 0}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.precisions.split(",")}
    for name in found:
        start(task | {"precision": name})
    for turn in range(arguments.runs):
        batches = arguments.batches if turn == arguments.runs - 1 else 0
        for name, runs in found.items():
            idle = None if arguments.no_wait else meter.wait_idle()
            load = os.getloadavg()[0]
            run = start(task | {"precision": name, "batches": batches})
            runs.append(run | {"load_before": load, "idle": meter.as_dict(idle)})
            print(f"{name}: {run['total']['wall_s']:.2f} s, {run['peak']}", file=sys.stderr)
    content = {
        "command": results.portable_command(["python", "-m", "benchmarks.cpu.startup", *sys.argv[1:]]),
        "model": arguments.model,
        "threads": arguments.threads,
        "machine": meter.as_dict(meter.machine()),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "summary": {name: summary(runs) for name, runs in found.items()},
        "runs": found,
    }
    if arguments.out is not None:
        results.write(arguments.out, content)
    print(json.dumps(content["summary"]))


if __name__ == "__main__":
    main()
