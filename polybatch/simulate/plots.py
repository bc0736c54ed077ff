"""Plots of runs, with matplotlib from the extra `bench`. No torch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polybatch.errors import ConfigError
from polybatch.simulate.cluster import Run
from polybatch.simulate.planner import Plan
from polybatch.simulate.report import between_tokens


def check_plot(path: Path) -> None:
    """Raise ConfigError where matplotlib is missing or the suffix is none that it writes."""
    _blank(path, 1, 1)


def _blank(path: Path, width: float, height: float) -> Any:
    """An empty figure in inches."""
    try:
        agg = importlib.import_module("matplotlib.backends.backend_agg")
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'polybatch[bench]'") from error
    figure = figures.Figure(figsize=(width, height), layout="constrained")
    canvas = agg.FigureCanvasAgg(figure)
    if path.suffix.lstrip(".") not in canvas.get_supported_filetypes():
        raise ConfigError(f"--plot is {path}, whose suffix matplotlib does not write: use .png or .svg")
    return figure


def plot_plan(plan: Plan, path: Path) -> None:
    """Attainment over the rate per device, a line per layout that was searched. Raises as `check_plot`."""
    figure = _blank(path, 9, 5)
    axes = figure.subplots()
    for candidate in plan.candidates:
        if not candidate.is_bound:
            num = candidate.layout.num_devices
            rates, shares = zip(*candidate.curve, strict=True)
            style = "-o" if candidate.layout.is_colocated else "--s"
            axes.plot(
                [rate / num for rate in rates], shares, style, markersize=4, label=candidate.layout.name
            )
    axes.axhline(plan.target, color="gray", linewidth=1)
    if plan.rate is not None:
        axes.axvline(plan.rate, color="gray", linewidth=1, linestyle=":")
    axes.set(
        title=f"{plan.trace}: requests that meet their limits", xlabel="requests/s per device",
        ylabel="share", xlim=(0, None), ylim=(0, 1.03),
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def plot_runs(runs: Sequence[tuple[str, Run]], path: Path) -> None:
    """Four panels: TTFT and TBT as cumulative shares, page use over time, first tokens over time.

    Raises ConfigError as `check_plot`.
    """
    figure = _blank(path, 11, 7)
    ((ttft, tbt), (pages, over_time)) = figure.subplots(2, 2)
    for label, run in runs:
        firsts = [(o.sent_s, t) for o in run.outcomes if (t := o.ttft_s) is not None]
        for axes, values in ((ttft, [t for _, t in firsts]), (tbt, between_tokens(run.outcomes))):
            if len(values):
                axes.plot(np.sort(values), np.linspace(0, 1, len(values)), label=label)
        over_time.plot(*zip(*firsts, strict=True), ".", markersize=2, label=label)
        for replica in run.replicas:
            num_pages = replica.machine.pool.num_pages
            name = label if len(run.replicas) == 1 else f"{label} #{replica.index}"
            pages.plot(replica.pages.times, np.array(replica.pages.kv) / num_pages, linewidth=1, label=name)
    for axes, title, x, y in (
        (ttft, "Time to first token", "seconds", "share of requests"),
        (tbt, "Time between tokens", "seconds", "share of tokens"),
        (pages, "Pages that running sequences hold", "seconds", "share of the pool"),
        (over_time, "Time to first token over time", "arrival, seconds", "seconds"),
    ):
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
    for axes in (ttft, tbt):
        axes.set_xscale("log")
    ttft.legend(fontsize="small")
    figure.savefig(path, dpi=120)
