"""Measure engines side by side on the CPU workloads W1 to W5.

    python -m benchmarks.cpu.run --engines polybatch:bfloat16,polybatch:int8,transformers \\
        --workloads W1,W2 --model smollm2-135m-instruct \\
        --model-for transformers=HF_FOLDER --out benchmarks/results/cpu/w1-w2.json

An engine is `kind` or `kind:precision`, kind one of polybatch, transformers, llama.cpp, openvino, vllm. Each
runs in a process of its own, with the interpreter of `--python KIND=PATH` where it lives in another
environment. All engines of a workload are loaded, warmed up, then timed turn by turn, so that a slow spell
of the machine meets all of them; only one computes at a time. What the machine could do at best stands
beside every result.

Ratios within one invocation count; absolute figures do not carry from machine to machine. `@FILE` on the
command line reads further arguments from a file, one a line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from benchmarks.cpu.client import EngineFailedError, EngineSpec, WorkerProcess
from polybatch.bench import meter, results, roofline, workloads
from polybatch.bench.results import Result
from polybatch.config import ModelSpec
from polybatch.errors import EngineError

console = Console(stderr=True)


def _pairs(values: list[str], flag: str) -> dict[str, str]:
    for value in values:
        if "=" not in value:
            sys.exit(f"{flag} is {value!r}; it must be NAME=VALUE")
    return dict(value.split("=", 1) for value in values)


def _lookup(table: dict[str, str], name: str, default: str) -> str:
    """The entry of an engine's full name, else of its kind, else the default."""
    return table.get(name, table.get(name.split(":")[0], default))


def engine_specs(arguments: argparse.Namespace) -> list[EngineSpec]:
    pythons = _pairs(arguments.python, "--python")
    models = _pairs(arguments.model_for, "--model-for")
    settings = _pairs(arguments.set, "--set")
    specs = []
    for name in arguments.engines.split(","):
        options: dict[str, str] = {}
        for owner in (name.split(":")[0], name):
            prefix = owner + "/"
            options |= {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
        specs.append(
            EngineSpec(
                name, _lookup(pythons, name, sys.executable), _lookup(models, name, arguments.model), options
            )
        )
    return specs


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
    )
    parser.add_argument("--engines", default="polybatch", help="comma-separated kind[:precision[:label]]")
    parser.add_argument("--workloads", default="W1,W2,W3,W4,W4base,W5,W5base")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--model-for", action="append", default=[], metavar="ENGINE=PATH")
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH")
    parser.add_argument("--set", action="append", default=[], metavar="ENGINE/OPTION=VALUE")
    parser.add_argument("--adapters", type=Path, help="folder for the random adapters; kept between runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--first-run", type=int, default=0, help="index of the first run's token ids")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--requests", type=int, help="fewer requests than the workload has, for trials")
    parser.add_argument("--no-wait", action="store_true", help="do not wait for an idle machine")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()) / "polybatch-bench-logs")
    return parser.parse_args(argv)


class Benchmark:
    """One invocation: which model, which engines, what came out so far."""

    def __init__(self, arguments: argparse.Namespace, spec: ModelSpec, limits: roofline.Limits) -> None:
        self.arguments, self.spec, self.limits = arguments, spec, limits
        self.results: list[Result] = []
        self.skipped: list[dict[str, str]] = []

    def run_workload(self, name: str, engines: list[EngineSpec]) -> None:
        """Load all engines, then time them turn by turn."""
        with ExitStack() as stack:
            live = [started for spec in engines if (started := self._start(stack, spec, name)) is not None]
            for turn in range(self.arguments.runs):
                run = self.arguments.first_run + turn
                shift = turn % max(1, len(live))
                # Whoever begins changes with the turn.
                for worker, result in live[shift:] + live[:shift]:
                    self._timed_run(worker, result, run)
            for worker, result in live:
                result.peak_rss_mb = worker.peak_rss_mb()
                if result.runs:
                    self.results.append(result)

    def _workload(self, name: str, run: int) -> workloads.Workload:
        return workloads.make(name, run, self.spec.vocab_size, self.arguments.requests)

    def _start(self, stack: ExitStack, spec: EngineSpec, name: str) -> tuple[WorkerProcess, Result] | None:
        log = self.arguments.logs / f"{spec.name.replace(':', '-')}--{name}.log"
        workload = self._workload(name, 0)
        adapters = self._adapters(workload)
        try:
            worker = stack.enter_context(WorkerProcess(spec, self.arguments.threads, log))
        except OSError as error:
            self._skip(spec, name, error)
            return None
        try:
            loaded = worker.load(workload, adapters)
            result = Result(spec.name, name, loaded["version"], load_s=round(loaded["load_s"], 2))
            token, seconds = worker.first_token(workloads.SANITY_PROMPT)
            result.startup_s = round(seconds, 2)
            if self.spec.vocab_size == workloads.SANITY_VOCAB_SIZE:
                result.sane = token == workloads.SANITY_NEXT
            start = time.perf_counter()
            worker.run(self._workload(name, 999).head(16))
            result.warmup_s = round(time.perf_counter() - start, 2)
        except EngineFailedError as error:
            self._skip(spec, name, error)
            worker.close()
            return None
        precision = roofline.PRECISIONS.get(spec.precision or "bfloat16")
        if precision is not None:
            result.bound = roofline.bound(self.spec, workload, precision, self.limits)
        console.print(f"{name} {spec.name}: {result.version}, loaded in {result.load_s} s")
        return worker, result

    def _timed_run(self, worker: WorkerProcess, result: Result, run: int) -> None:
        workload = self._workload(result.workload, run)
        idle = None if self.arguments.no_wait else meter.wait_idle()
        before = meter.cpu_times()
        try:
            timed = worker.run(workload)
            record = results.record(workload, run, timed, idle, meter.cpu_use(before, meter.cpu_times()))
        except (EngineFailedError, EngineError) as error:
            self._skip(worker.spec, result.workload, error)
            return
        result.runs.append(record)
        speed = f"{record.decode_tok_s} tok/s" if record.decode_tok_s else f"{record.out_tok_s} out tok/s"
        console.print(f"{result.workload} {result.engine} run {run}: {record.total_s:.2f} s, {speed}")

    def _adapters(self, workload: workloads.Workload) -> dict[str, str]:
        if not workload.adapters:
            return {}
        # Imported here: it needs torch, which the workloads without adapters do not.
        from polybatch.bench.random_adapters import write_adapters
        from polybatch.bench.runner import adapter_cache

        folder = self.arguments.adapters or adapter_cache()
        return {
            name: str(path) for name, path in write_adapters(self.spec, workload.adapters, folder).items()
        }

    def _skip(self, spec: EngineSpec, name: str, error: Exception) -> None:
        reason = str(error)
        is_unsupported = isinstance(error, EngineFailedError) and error.is_unsupported
        verdict = "not supported" if is_unsupported else "failed"
        console.print(f"{name} {spec.name}: {verdict}: {reason}", markup=False)
        self.skipped.append({"engine": spec.name, "workload": name, "reason": reason.splitlines()[0][:300]})


def main() -> None:
    arguments = parse()
    from polybatch.bench.limits import measure
    from polybatch.bench.runner import model_spec

    spec = model_spec(arguments.model)
    if not arguments.no_wait:
        meter.wait_idle()
    limits = measure(spec, arguments.threads)
    console.print(f"this machine at best, with torch: {json.dumps(asdict(limits))}")
    benchmark = Benchmark(arguments, spec, limits)
    command = results.portable_command(["python", "-m", "benchmarks.cpu.run", *sys.argv[1:]])
    for name in arguments.workloads.split(","):
        benchmark.run_workload(name, engine_specs(arguments))
        # Written after every workload, so that an interruption loses only the one under way.
        content = results.document(
            benchmark.results,
            command=command,
            model=arguments.model,
            threads=arguments.threads,
            machine=meter.machine(),
            limits=limits,
            skipped=benchmark.skipped,
        )
        results.write(arguments.out, content)
    results.show(content)
    print(json.dumps({"out": arguments.out.name, "medians": _summary(benchmark.results)}))
    # Coarse quantisation may cost another engine the answer; ours has to be right.
    wrong = [r for r in benchmark.results if r.sane is False and r.engine.startswith("polybatch")]
    sys.exit(0 if benchmark.results and not wrong else 1)


def _summary(measured: list[Result]) -> dict[str, float | None]:
    return {f"{result.workload} {result.engine}": result.median(result.headline) for result in measured}


if __name__ == "__main__":
    main()
