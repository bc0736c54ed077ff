"""Draw a run's folder: `python -m benchmarks.cuda.plots benchmarks/results/cuda --into docs/plots`.

    decode_steps   milliseconds of a decode step by batch: measured, floor, practical floor, with adapters
    adapters       tokens per second by adapter mix beside the plain batch
    traffic        G6: tokens per second and time to the first token by arrival rate

Needs matplotlib (`pip install 'polybatch[bench]'`). Writes one .svg per plot that the folder has figures for.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cuda import figures
from benchmarks.cuda.figures import ELSEWHERE, Figure
from benchmarks.cuda.workloads import MIXES

MIX_NAMES = {
    "1": "1 adapter", "8": "8 in turn", "64": "64 in turn", "64zipf": "64, Zipf", "half": "64 on every 2nd",
}  # fmt: skip
Known = dict[str, Figure]


def decode_steps(known: Known, axes: Any) -> bool:
    """Lines over the batch, one per set of adapters, and the limits of the plain steps."""
    series: dict[str, list[tuple[int, Figure]]] = {}
    for key, figure in known.items():
        head, _, batch = key.partition(" B=")
        if batch:
            series.setdefault(head, []).append((int(batch), figure))
    for head, points in sorted(series.items()):
        points.sort(key=lambda point: point[0])
        batches = [batch for batch, _ in points]
        mix = head.removeprefix("G5-")
        label = "no adapters" if head == "G2" else MIX_NAMES[mix]
        axes.plot(batches, [figure.value for _, figure in points], "o-", label=label)
        if head == "G2":
            for name, style in (("floor", ":"), ("practical_floor", "--")):
                limits = [getattr(figure, name) for _, figure in points]
                if None not in limits:
                    axes.plot(batches, limits, style, color="grey", label=name.replace("_", " "))
    axes.set(xlabel="rows in the batch", ylabel="ms per decode step", ylim=(0, None), title="Decode steps")
    axes.legend()
    return bool(series)


def adapters(known: Known, axes: Any) -> bool:
    """Bars per mix, ours beside the best of another engine where it was measured."""
    keys = ["G5 plain" if "G5 plain" in known else "G1", *(f"G5-{mix}" for mix in MIXES)]
    shown = [key for key in keys if key in known]
    names = ["no adapters" if not key.startswith("G5-") else MIX_NAMES[key[3:]] for key in shown]
    places = range(len(shown))
    axes.bar([p - 0.2 for p in places], [known[key].value for key in shown], 0.4, label="polybatch")
    others = [(p, ELSEWHERE["G1" if key == "G5 plain" else key]) for p, key in enumerate(shown)
              if ("G1" if key == "G5 plain" else key) in ELSEWHERE]  # fmt: skip
    axes.bar(
        [p + 0.2 for p, _ in others], [value for _, value in others], 0.4, label="vLLM 0.26, another run"
    )
    axes.set(ylabel="output tokens per second", title="256 requests, LoRAs of rank 16")
    axes.set_xticks(list(places), names, rotation=20)
    axes.margins(y=0.25)
    axes.legend(loc="upper right", ncols=2)
    return bool(shown)


def traffic(known: Known, axes: Any) -> bool:
    """Tokens per second by rate, a line per number of registered adapters."""
    shown = [figure for key, figure in known.items() if key.startswith("G6 ") and key.endswith(" adapters")]
    for figure in shown:
        points = sorted((float(rate), served["out_tok_s"]) for rate, served in figure.details.items())  # type: ignore[index]
        label = figure.key.removeprefix("G6 ") + " registered"
        axes.plot([rate for rate, _ in points], [value for _, value in points], "o-", label=label)
    axes.set(xlabel="requests per second", ylabel="output tokens per second", ylim=(0, None),
             title="Traffic over adapters of ranks 8 to 64")  # fmt: skip
    axes.legend()
    return bool(shown)


PLOTS: dict[str, Callable[[Known, Any], bool]] = {
    "decode_steps": decode_steps,
    "adapters": adapters,
    "traffic": traffic,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda.plots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="of a run, or its bundle")
    parser.add_argument("--into", type=Path, required=True)
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text and ids stay the same, so that drawing again changes only what was measured anew.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "polybatch"}
    import matplotlib.pyplot as plt

    documents = figures.read(arguments.folder)
    known = {figure.key: figure for figure in figures.figures_of(documents)}
    arguments.into.mkdir(parents=True, exist_ok=True)
    for name, draw in PLOTS.items():
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        if draw(known, axes):
            file = arguments.into / f"{arguments.folder.resolve().stem}_{name}.svg"
            figure.savefig(file, metadata={"Date": None})
            print(file)
        plt.close(figure)


if __name__ == "__main__":
    main()
