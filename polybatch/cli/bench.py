"""`polybatch bench`: the standard workloads on this machine, with its limits beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polybatch.cli.options import STUB_MODEL, EngineOptions, with_engine
from polybatch.errors import ConfigError

if TYPE_CHECKING:
    from polybatch.bench.workloads import Workload
    from polybatch.config import ModelSpec
    from polybatch.engine.llm import LLM


@with_engine
def bench(
    *,
    workloads: Annotated[
        str, typer.Option("--workloads", "-w", help="Any of W1 to W5, W4base, W5base; comma-separated.")
    ] = "W1,W2,W3,W4base,W4",
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each; medians are shown.")] = 3,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Fewer requests than a workload has, for a quick look.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait for an idle machine before each run.")] = True,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file to write.")] = None,
    engine: EngineOptions,
) -> None:
    """Measure speed on fixed workloads: single stream, offline batch, shared prefix, many adapters.

    W1 is one stream of 128 tokens in and out; W2 64 prompts of 32 to 256 tokens, 64 out; W3 64 prompts with
    512 tokens in common, 32 out; W4 16 random LoRA adapters of rank 8 over 64 prompts, W4base the same
    without them; W5 48 adapters of ranks 4 to 64 over W2's prompts. "of limit" is the share of what the
    machine's memory bandwidth and arithmetic would allow.
    """
    names = _names(workloads)
    if engine.adapter:
        raise ConfigError("--adapter is given; bench registers random adapters of its own: drop it")
    if engine.chosen_model() == STUB_MODEL:
        raise ConfigError(f"--model is {STUB_MODEL!r}, which computes nothing: name a real model")
    _run(names, runs, requests, wait, out, engine)


def _names(workloads: str) -> list[str]:
    from polybatch.bench.workloads import NAMES

    names = [name.strip() for name in workloads.split(",")]
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"--workloads names {name!r}; it must be some of {', '.join(NAMES)}")
    return names


def _run(
    names: list[str], runs: int, requests: int | None, wait: bool, out: Path | None, engine: EngineOptions
) -> None:
    import sys

    import torch
    from rich.console import Console

    from polybatch import __version__
    from polybatch.bench import limits, meter, results, roofline
    from polybatch.bench import workloads as standard
    from polybatch.bench.runner import model_spec, run_workloads

    console = Console(stderr=True)
    spec = model_spec(engine.chosen_model())
    threads = engine.threads or torch.get_num_threads()
    if wait:
        console.print("waiting until the machine is idle, for minutes at most; --no-wait measures at once")
        meter.wait_idle()
    machine_limits = limits.measure(spec, threads)
    rates = ", ".join(f"{dtype} {rate:g}" for dtype, rate in machine_limits.gflops.items())
    console.print(
        f"this machine at best, with torch: reads {machine_limits.read_gbs:g} GB/s, Gflop/s: {rates}",
        highlight=False,
    )
    label = engine.quantization or engine.dtype
    measured = []
    for result in run_workloads(
        names,
        lambda workload: _load(engine, spec, workload),
        vocab_size=spec.vocab_size,
        label=label,
        version=f"polybatch {__version__}, torch {torch.__version__}",
        num_runs=runs,
        wait=wait,
        num_requests=requests,
    ):
        workload = standard.make(result.workload, 0, spec.vocab_size, requests)
        precision = roofline.PRECISIONS.get(label, roofline.PRECISIONS["bfloat16"])
        result.bound = roofline.bound(spec, workload, precision, machine_limits)
        console.print(f"{result.workload}: {result.median(result.headline):.1f} tok/s ({result.headline})")
        measured.append(result)
    content = results.document(
        measured,
        command=results.portable_command(["polybatch", *sys.argv[1:]]),
        model=engine.chosen_model(),
        threads=threads,
        machine=meter.machine(),
        limits=machine_limits,
    )
    if out is not None:
        results.write(out, content)
    results.show(content)


def _load(engine: EngineOptions, spec: ModelSpec, workload: Workload) -> LLM:
    from polybatch.bench.random_adapters import write_adapters
    from polybatch.bench.runner import adapter_cache
    from polybatch.engine.llm import LLM

    paths = write_adapters(spec, workload.adapters, adapter_cache()) if workload.adapters else {}
    settings: dict[str, Any] = engine.engine_settings()
    settings["max_model_len"] = settings["max_model_len"] or workload.max_model_len
    return LLM(engine.chosen_model(), adapters={name: str(path) for name, path in paths.items()}, **settings)
