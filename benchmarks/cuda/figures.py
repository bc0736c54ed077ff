"""What the pieces leave behind: figures with their limits beside them, the bars they must pass, JSON files.

One file per piece, `G1.json` and so on, in one folder per run, or all in one file; `read` takes either.
No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HIGHER_IS_BETTER = "tok/s"


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number.

    key: what bars and plots call it. unit: "out tok/s", "in tok/s", "ms", "s"; of the ceilings others.
    values: of the single runs, whose median `value` is. floor, practical_floor: in the same unit; None where
    there is none. note: what a reader must know to compare it.
    """

    key: str
    value: float
    unit: str
    values: tuple[float, ...] = ()
    floor: float | None = None
    practical_floor: float | None = None
    note: str = ""
    details: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bar:
    """A claim about a figure: its value, or its ratio to another one or to its practical floor, has a limit.

    of: key of the other figure, PRACTICAL_FLOOR, or None. The figure must reach the limit where more is
    better and keep below it otherwise.
    """

    key: str
    limit: float
    of: str | None = None


PRACTICAL_FLOOR = "practical floor"

BARS = (
    Bar("G1", 9300),
    Bar("G1", 0.83, PRACTICAL_FLOOR),
    Bar("G1", 1.4, "G1 transformers"),
    Bar("G2 B=1", 6.3),
    *(Bar(f"G2 B={batch}", 1.12, PRACTICAL_FLOOR) for batch in (32, 64, 128, 256)),
    Bar("G3", 43_000),
    Bar("G4", 1.1),
    Bar("G5-1", 0.95, "G5 plain"),
    Bar("G5-64", 0.85, "G5 plain"),
    Bar("G5-64zipf", 0.85, "G5 plain"),
    *(Bar(f"G5-{mix} B={batch}", 1.25, PRACTICAL_FLOOR) for mix in ("64", "64zipf") for batch in (64, 256)),
    *(Bar(f"G5-{mix} B=64", 11.5) for mix in ("64", "64zipf")),
    *(Bar(f"G5-{mix} B=256", 18.0) for mix in ("64", "64zipf")),
    *(Bar(f"G5-half B={batch}", 1.0, f"G5-64 B={batch}") for batch in (64, 256)),
    Bar("G6 1000 adapters", 0.9, "G6 64 adapters"),
    Bar("G6 1000 adapters, clustered", 0.9, "G6 64 adapters"),
    Bar("G6 1000 adapters", 30, "peft, an adapter a row"),
    Bar("G6 TTFT, twice what fits", 2.0, "G6 TTFT, all resident"),
    Bar("start-up", 30),
    Bar("start-up with adapters", 1.1, "start-up"),
)

ELSEWHERE = {
    "G1": 8950, "G2 B=1": 6.42, "G2 B=32": 7.96, "G2 B=64": 7.89, "G2 B=128": 10.5, "G2 B=256": 15.4,
    "G3": 43_370, "G4": 2.06, "G5-1": 6953, "G5-8": 4958, "G5-64": 3633, "G5-64zipf": 3904,
    "G5-64 B=64": 35.5, "G5-64 B=256": 39.8,
}  # fmt: skip
"""vLLM 0.26 on an H100 80GB HBM3 in 2026-11, its better setting for each row; not of the same run."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A bar held against the figures. measured: what was compared with the limit."""

    bar: Bar
    measured: float
    is_met: bool
    is_more_better: bool

    def __str__(self) -> str:
        sign = ("≥" if self.is_met else "<") if self.is_more_better else ("≤" if self.is_met else ">")
        limit = number(self.bar.limit) + (f" of {self.bar.of}" if self.bar.of else "")
        return f"{'met' if self.is_met else 'MISSED'}: {number(self.measured)} {sign} {limit}"


def judge(figures: Iterable[Figure]) -> dict[str, list[Verdict]]:
    """Verdicts by figure; a bar whose figures are not all there says nothing."""
    known = {figure.key: figure for figure in figures}
    verdicts: dict[str, list[Verdict]] = {}
    for bar in BARS:
        figure = known.get(bar.key)
        if figure is None:
            continue
        measured: float | None = figure.value
        if bar.of == PRACTICAL_FLOOR:
            measured = figure.value / figure.practical_floor if figure.practical_floor else None
        elif bar.of is not None:
            measured = figure.value / known[bar.of].value if bar.of in known else None
        if measured is not None:
            is_more_better = figure.unit.endswith(HIGHER_IS_BETTER)
            is_met = measured >= bar.limit if is_more_better else measured <= bar.limit
            verdicts.setdefault(bar.key, []).append(Verdict(bar, measured, is_met, is_more_better))
    return verdicts


def number(value: float | None) -> str:
    """Three or four digits that count: 8,950; 12.4; 0.83; "-" for None."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
    return f"{value:,.{digits}f}"


def piece_document(
    piece: str, figures: Sequence[Figure], error: str | None, seconds: float, context: Mapping[str, object]
) -> dict[str, object]:
    """What is written for a piece. context: machine, command, versions, ceilings and settings of the run."""
    return {
        **context,
        "piece": piece,
        "seconds": round(seconds, 1),
        "error": error,
        "figures": [asdict(figure) for figure in figures],
    }


def read(run: Path) -> list[dict[str, Any]]:
    """The documents of a run's pieces by name, from its folder or from one file that bundles them."""
    if run.is_file():
        bundled: list[dict[str, Any]] = json.loads(run.read_text())["pieces"]
        return bundled
    return [json.loads(path.read_text()) for path in sorted(run.glob("*.json"))]


def figures_of(documents: Iterable[Mapping[str, Any]]) -> list[Figure]:
    """All figures of these pieces; of those that two pieces have, the first one's."""
    found: dict[str, Figure] = {}
    for document in documents:
        for entry in document["figures"]:
            found.setdefault(entry["key"], Figure(**{**entry, "values": tuple(entry["values"])}))
    return list(found.values())
