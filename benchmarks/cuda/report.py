"""Turn a run's folder into a Markdown table: `python -m benchmarks.cuda.report benchmarks/results/cuda`.

Prints to stdout, or with `--into docs/performance.md` replaces what stands between the lines
`<!-- results:NAME -->` and `<!-- /results:NAME -->` of that page, NAME being the folder's or bundle's name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu.report import replace_section
from benchmarks.cuda import figures
from benchmarks.cuda.figures import ELSEWHERE, Figure, number

HEADER = ("figure", "measured", "spread", "floor", "practical floor", "of practical", "vLLM 0.26¹", "bars")


def markdown(documents: Sequence[dict[str, Any]]) -> str:
    """The card and what it can do, all figures with their limits and bars, what failed and why."""
    if not documents:
        return "No piece has been run.\n"
    first = documents[0]
    device, found = first["device"], figures.figures_of(documents)
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines = [
        f"{device['name']}, {first['model']}, {first['precision']}, {first['created'][:10]}; {versions}."
    ]
    for document in documents:
        if ceilings := document.get("ceilings"):
            lines.append(
                f"At best, with torch: {number(ceilings['limits']['read_gbs'])} GB/s read, "
                f"{number(ceilings['limits']['gflops']['bfloat16'] / 1000)} TFLOP/s in bfloat16."
            )
    commands = dict.fromkeys(document["command"] for document in documents)
    lines += ["", *(f"`{command}`" for command in commands), ""]
    lines += ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    verdicts = figures.judge(found)
    for figure in found:
        judged = "; ".join(str(verdict) for verdict in verdicts.get(figure.key, []))
        lines.append("| " + " | ".join((*_row(figure), judged)) + " |")
    lines += ["", "¹ Measured on an H100 80GB HBM3 in 2026-11, not in this run.", ""]
    lines += [f"- {figure.key}: {figure.note}." for figure in found if figure.note]
    lines += [f"- {d['piece']}: failed after {d['seconds']} s: {d['error']}" for d in documents if d["error"]]
    return "\n".join(lines) + "\n"


def _row(figure: Figure) -> tuple[str, ...]:
    spread = f"{number(min(figure.values))} to {number(max(figure.values))}" if figure.values else "-"
    share = figure.value / figure.practical_floor if figure.practical_floor else None
    return (
        figure.key,
        f"{number(figure.value)} {figure.unit}",
        spread,
        number(figure.floor),
        number(figure.practical_floor),
        "-" if share is None else f"{share:.2f} x",
        number(ELSEWHERE.get(figure.key)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.report", description=__doc__)
    parser.add_argument("folder", type=Path, help="of a run, or its bundle")
    parser.add_argument("--into", type=Path)
    arguments = parser.parse_args()
    text = markdown(figures.read(arguments.folder))
    if arguments.into is None:
        sys.stdout.write(text)
    else:
        page = arguments.into.read_text()
        arguments.into.write_text(replace_section(page, arguments.folder.resolve().stem, text))


if __name__ == "__main__":
    main()
