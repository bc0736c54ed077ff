"""`polybatch plan`: how many machines, used how, for this traffic and these limits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polybatch.cli.simulate import traffic_of
from polybatch.errors import ConfigError

if TYPE_CHECKING:
    from polybatch.simulate.machines import Machine
    from polybatch.simulate.planner import Plan

_OUTPUT = "Output"


def plan(
    *,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", "-t", metavar="FILE", show_default=False, help="As for polybatch simulate."),
    ] = None,
    workload: Annotated[
        str | None, typer.Option("--workload", "-w", show_default=False, help="As for polybatch simulate.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the workload; repeat for more."),
    ] = None,
    slo: Annotated[str, typer.Option(help="Limits in seconds, such as ttft=0.3,tpot=0.05,e2e=10.")],
    machine: Annotated[
        list[str] | None,
        typer.Option(
            "--machine",
            metavar="NAME|FILE",
            help="Built-in or a profile written by polybatch calibrate; repeat to compare machines.",
        ),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second to be served; without it, goodput alone.")
    ] = None,
    max_devices: Annotated[int, typer.Option(min=1, help="Devices of one group of engines, at most.")] = 1,
    tensor_parallel: Annotated[
        str, typer.Option(help="Degrees to try, estimated from each machine, such as 1,2,4.")
    ] = "1",
    chunks: Annotated[str, typer.Option(help="Prompt tokens per step to try.")] = "512,2048,8192",
    disaggregate: Annotated[
        bool, typer.Option(help="Also try engines that only prefill beside engines that only decode.")
    ] = True,
    target: Annotated[float, typer.Option(help="Share of the requests that must meet their limits.")] = 0.9,
    policy: Annotated[str, typer.Option("--policy", "-p", help="Scheduling policy.")] = "fcfs",
    requests: Annotated[int | None, typer.Option(min=1, help="Only the first so many requests.")] = None,
    seed: Annotated[int, typer.Option(help="Of the workload.")] = 42,
    traffic_seconds: Annotated[
        float, typer.Option(min=1, help="Arrivals of each trial; the trace is cut or repeated.")
    ] = 60.0,
    seconds: Annotated[float, typer.Option(min=0, help="Begin no further layout after so long.")] = 50.0,
    json_out: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", rich_help_panel=_OUTPUT, help="Write all that was found."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_OUTPUT, help="Attainment over the rate; needs matplotlib."
        ),
    ] = None,
) -> None:
    """Search replicas, parallel degree, step size and colocated or separate phases by simulation.

    Will 500 adapters of rank 16 and 8 requests/s meet 300 ms TTFT on one H100?

        polybatch plan -w slora --set num_adapters=500 --set ranks=16 --rate 8 --slo ttft=0.3
    """
    from rich.console import Console

    from polybatch.scheduling.policies import policy_named
    from polybatch.simulate.engine import EngineSettings
    from polybatch.simulate.machines import load_machine
    from polybatch.simulate.planner import layouts, search, verdict
    from polybatch.simulate.plots import check_plot, plot_plan
    from polybatch.simulate.report import parse_slo
    from polybatch.simulate.tables import plan_table

    policy_named(policy)
    if plot is not None:
        check_plot(plot)
    limits = parse_slo(slo)
    measured = [load_machine(name) for name in machine or ["h100-8b"]]
    machines = _degrees(measured, _numbers("--tensor-parallel", tensor_parallel))
    tried = layouts(machines, max_devices, _numbers("--chunks", chunks), is_disaggregated=disaggregate)
    source = traffic_of(trace, workload, set_ or [], rate if workload else None, requests, seed)
    console = Console()
    with console.status("simulating") as status:
        found = search(
            source, limits, tried, EngineSettings(policy=policy), rate=rate, target=target,
            traffic_s=traffic_seconds, seconds=seconds,
            progress=lambda layout: status.update(f"simulating {layout.name}"),
        )  # fmt: skip
    console.print(plan_table(found))
    for sentence in verdict(found):
        console.print(sentence, soft_wrap=True)
    if json_out is not None:
        _write(json_out, found)
    if plot is not None:
        plot_plan(found, plot)


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"{option} is {text!r}; it must be positive numbers, such as 1,2,4")
    return [int(part) for part in parts]


def _degrees(machines: list[Machine], degrees: list[int]) -> list[Machine]:
    from polybatch.simulate.machines import scaled

    return [
        machine if degree == 1 else scaled(machine, num_devices=degree)
        for machine in machines
        for degree in degrees
    ]


def _write(path: Path, found: Plan) -> None:
    import json

    from polybatch import __version__

    path.write_text(json.dumps({"version": __version__, **found.as_json()}, indent=1) + "\n")
