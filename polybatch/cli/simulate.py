"""`polybatch simulate`: a trace or a workload on a simulated machine, by the scheduler that serves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polybatch.cli.service_flags import stage_times_of
from polybatch.errors import ConfigError

if TYPE_CHECKING:
    from polybatch.simulate.cluster import Run
    from polybatch.simulate.machines import Machine
    from polybatch.simulate.report import Report, Slo
    from polybatch.simulate.traces import Trace

_CLUSTER = "Several engines"
_OUTPUT = "Output"


def simulate(
    *,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            "-t",
            metavar="FILE",
            show_default=False,
            help="Azure's CSV, Mooncake's JSON lines, our own, or a batch file.",
        ),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            "--workload", "-w", show_default=False, help="slora, sarathi, distserve, hexgen or batchllm."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the workload; repeat for more."),
    ] = None,
    machine: Annotated[
        list[str] | None,
        typer.Option(
            "--machine",
            metavar="NAME|FILE",
            help="Built-in (h100-8b, cpu-135m) or a profile written by polybatch calibrate; repeat for "
            "engines on unlike machines.",
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option("--policy", "-p", help="Scheduling policy; several, comma-separated, are compared.")
    ] = "fcfs",
    batching: Annotated[
        str,
        typer.Option(help="How prompts and decodes share steps: stall_free, or one to compare it with."),
    ] = "stall_free",
    service: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A service level that the scheduler works for, such as target_tbt_s=0.03; repeat for more.",
        ),
    ] = None,
    stage_times: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SECONDS|FILE.json",
            help="What stages of workflows take on average, if the scheduler shall know it; repeat for more.",
        ),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second, instead of the trace's own.")
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Only the first so many requests.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="What clients ask for; true lengths then stay unknown to the scheduler."),
    ] = None,
    slo: Annotated[
        str | None, typer.Option(help="Limits in seconds, such as ttft=0.3,tpot=0.05,e2e=10.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="Prompt tokens per step, instead of the machine's.")
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, help="Sequences that run at once, instead of the machine's.")
    ] = None,
    enable_prefix_caching: Annotated[
        bool, typer.Option(help="Reuse the KV of prompts that begin alike.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the workload.")] = 42,
    replicas: Annotated[int, typer.Option(min=1, rich_help_panel=_CLUSTER, help="Engines per machine.")] = 1,
    router: Annotated[
        str,
        typer.Option(
            rich_help_panel=_CLUSTER,
            help="round-robin, least-work, hexgen, prefix-affinity or adapter-affinity.",
        ),
    ] = "least-work",
    disaggregate: Annotated[
        str | None,
        typer.Option(
            metavar="P:D",
            rich_help_panel=_CLUSTER,
            show_default=False,
            help="P engines only prefill and D only decode, on the one machine given.",
        ),
    ] = None,
    json_out: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", rich_help_panel=_OUTPUT, help="Write the numbers."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_OUTPUT, help="Draw them, as .png or .svg; needs matplotlib."
        ),
    ] = None,
) -> None:
    """Run the real scheduler over a trace on a machine that a cost model stands for.

    Times are predicted, decisions are not: scheduler, page pool and prefix tree are the ones that serve.
    """
    from polybatch.config import ServiceLevels
    from polybatch.scheduling.policies import policy_named
    from polybatch.simulate.cluster import simulate as run_trace
    from polybatch.simulate.engine import EngineSettings
    from polybatch.simulate.report import parse_slo, report

    policies = [name.strip() for name in policy.split(",")]
    for name in policies:
        policy_named(name)
    levels = ServiceLevels.of(_service_levels(service or []))
    known_stages = stage_times_of(stage_times or ())
    limits = None if slo is None else parse_slo(slo)
    machines, num_prefill = _machines(machine or ["h100-8b"], replicas, disaggregate)
    source = traffic_of(trace, workload, set_ or [], rate, requests, seed)
    runs: list[tuple[str, Run]] = []
    for name in policies:
        settings = EngineSettings(
            policy=name,
            batching=batching,
            service=levels,
            stage_times=tuple(known_stages.items()),
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_tokens=max_tokens,
            enable_prefix_caching=enable_prefix_caching,
        )
        runs.append((name, run_trace(source, machines, settings, router=router, num_prefill=num_prefill)))
    _show([(name, report(run, limits)) for name, run in runs], machines)
    if json_out is not None:
        _write(json_out, runs, limits, machines)
    if plot is not None:
        from polybatch.simulate.plots import plot_runs

        plot_runs(runs, plot)


def traffic_of(
    path: Path | None,
    workload: str | None,
    options: list[str],
    rate: float | None,
    num: int | None,
    seed: int,
) -> Trace:
    """What the options for traffic ask for. Raises ConfigError where they do not fit together."""
    from polybatch.simulate.readers import read_trace
    from polybatch.simulate.workloads import make_workload, options_of

    if (path is None) == (workload is None):
        raise ConfigError("one of --trace and --workload is needed, and not both: name a file or a workload")
    if path is not None:
        if options:
            raise ConfigError(f"--set is {options[0]!r} and a trace has no parameters: drop it")
        found = read_trace(path)
        found = found.at_rate(rate) if rate is not None else found
    else:
        assert workload is not None
        values = options_of(workload, options)
        if rate is not None:
            values["rate"] = rate
        found = make_workload(workload, seed=seed, **values)
    return found if num is None else found.head(num)


def _service_levels(pairs: list[str]) -> dict[str, float | bool | None]:
    words = {"true": True, "false": False, "none": None}
    values: dict[str, float | bool | None] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            values[name] = words[text] if text in words else float(text)
        except ValueError as error:
            raise ConfigError(
                f"--service is {pair!r}; it must be NAME=VALUE with a number, true, false or none"
            ) from error
    return values


def _machines(names: list[str], replicas: int, disaggregate: str | None) -> tuple[list[Machine], int]:
    """A machine per engine, and how many of them only prefill."""
    from polybatch.simulate.machines import load_machine

    machines = [load_machine(name) for name in names for _ in range(replicas)]
    if disaggregate is None:
        return machines, 0
    counts = disaggregate.split(":")
    if len(counts) != 2 or not all(part.isdigit() and int(part) > 0 for part in counts):
        raise ConfigError(f"--disaggregate is {disaggregate!r}; it must be two positive numbers, such as 1:2")
    if len(machines) != 1:
        raise ConfigError(
            f"--disaggregate is {disaggregate!r} with {len(machines)} engines besides: name one machine and "
            "leave --replicas out"
        )
    num_prefill, num_decode = map(int, counts)
    return machines * (num_prefill + num_decode), num_prefill


def _show(reports: list[tuple[str, Report]], machines: list[Machine]) -> None:
    from collections import Counter

    from rich.console import Console

    from polybatch.simulate.tables import times_table, totals_table

    console = Console()
    for name, found in reports:
        title = f"{name}: " if len(reports) > 1 else ""
        console.print(times_table(found, title))
    console.print(totals_table(reports))
    engines = Counter(machine.name for machine in machines)
    names = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in engines.items())
    console.print(f"simulated on {names}", soft_wrap=True, highlight=False, markup=False)
    if any(machine.is_estimate for machine in machines):
        console.print("the machine is an estimate, not measured: see polybatch calibrate")


def _write(path: Path, runs: list[tuple[str, Run]], limits: Slo | None, machines: list[Machine]) -> None:
    import json

    from polybatch import __version__
    from polybatch.simulate.report import report

    content = {
        "version": __version__,
        "machines": [machine.name for machine in machines],
        "policies": {name: report(run, limits).as_json() for name, run in runs},
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
