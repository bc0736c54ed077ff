"""What a benchmark run leaves behind: records of runs, medians, a JSON document, a table.

The same document comes from `polybatch bench` and from `benchmarks/cpu/run.py`. No torch.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from polybatch.bench.meter import CpuUse, Idleness, Machine
from polybatch.bench.roofline import Bound, Limits
from polybatch.bench.workloads import Workload
from polybatch.errors import EngineError

FORMAT = 1
PLAIN_WIDTH = 120


@dataclass(frozen=True, slots=True)
class Timed:
    """What an engine gave back for the requests of a workload.

    tokens: per request, in order. stamps: seconds from the start to each token of a stream, else empty.
    """

    total_s: float
    tokens: Sequence[Sequence[int]]
    stamps: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One timed run. first_tokens: beginning of the first request's output, to compare engines by eye."""

    run: int
    total_s: float
    input_tokens: int
    output_tokens: int
    out_tok_s: float
    in_tok_s: float
    ttft_ms: float | None = None
    decode_tok_s: float | None = None
    idle: Idleness | None = None
    cpu: CpuUse | None = None
    first_tokens: tuple[int, ...] = ()


FIGURES = ("total_s", "out_tok_s", "in_tok_s", "ttft_ms", "decode_tok_s")


def record(
    workload: Workload, run: int, timed: Timed, idle: Idleness | None = None, cpu: CpuUse | None = None
) -> RunRecord:
    """The figures of one run. Raises EngineError if an output is missing or has the wrong length."""
    wanted = [request.max_tokens for request in workload.requests]
    lengths = [len(tokens) for tokens in timed.tokens]
    if lengths != wanted:
        wrong = next(
            (i for i, (n, want) in enumerate(zip(lengths, wanted, strict=False)) if n != want),
            min(len(lengths), len(wanted)),
        )
        raise EngineError(
            f"{workload.name}: the engine gave {len(lengths)} outputs for {len(wanted)} requests; "
            f"request {wrong} is the first whose output has not exactly the forced number of tokens"
        )
    ttft_ms = decode_tok_s = None
    if workload.is_stream:
        if len(timed.stamps) != wanted[0]:
            raise EngineError(f"{workload.name}: {len(timed.stamps)} time stamps for {wanted[0]} tokens")
        ttft_ms = round(1000 * timed.stamps[0], 2)
        decode_tok_s = round((wanted[0] - 1) / (timed.stamps[-1] - timed.stamps[0]), 2)
    return RunRecord(
        run=run,
        total_s=round(timed.total_s, 4),
        input_tokens=workload.num_input_tokens,
        output_tokens=workload.num_output_tokens,
        out_tok_s=round(workload.num_output_tokens / timed.total_s, 2),
        in_tok_s=round(workload.num_input_tokens / timed.total_s, 2),
        ttft_ms=ttft_ms,
        decode_tok_s=decode_tok_s,
        idle=idle,
        cpu=cpu,
        first_tokens=tuple(timed.tokens[0][:8]),
    )


@dataclass(slots=True)
class Result:
    """An engine on a workload: its runs, and the limit of the machine beside them.

    engine: "name:precision". load_s: until the engine could take a request. startup_s: from the start of its
    process to its first token, None within one process. sane: the sanity prompt went on as it must;
    None where the model is another one. peak_rss_mb: process tree, since its start.
    """

    engine: str
    workload: str
    version: str
    runs: list[RunRecord] = field(default_factory=list)
    load_s: float | None = None
    startup_s: float | None = None
    warmup_s: float | None = None
    peak_rss_mb: float | None = None
    sane: bool | None = None
    bound: Bound | None = None

    def median(self, figure: str) -> float | None:
        values = [v for v in (getattr(run, figure) for run in self.runs) if v is not None]
        return statistics.median(values) if values else None

    def spread(self, figure: str) -> tuple[float, float] | None:
        values = [v for v in (getattr(run, figure) for run in self.runs) if v is not None]
        return (min(values), max(values)) if values else None

    @property
    def headline(self) -> str:
        """The figure by which engines are compared on this workload."""
        if any(run.decode_tok_s is not None for run in self.runs):
            return "decode_tok_s"
        return "out_tok_s"

    @property
    def share_of_bound(self) -> float | None:
        measured = self.median(self.headline)
        limit = None if self.bound is None else getattr(self.bound, self.headline)
        return None if measured is None or not limit else measured / limit

    def to_json(self) -> dict[str, object]:
        return {
            **asdict(self),
            "median": {figure: self.median(figure) for figure in FIGURES},
            "share_of_bound": self.share_of_bound,
        }


def portable_command(arguments: Sequence[str]) -> str:
    """The command line with paths of this one machine cut down to their last part."""
    return " ".join(_portable(argument) for argument in arguments)


def _portable(argument: str) -> str:
    head, sep, value = argument.rpartition("=")
    if argument.startswith("@"):
        head, sep, value = "", "@", argument[1:]
    return f"{head}{sep}{os.path.basename(value.rstrip('/'))}" if value.startswith("/") else argument


def document(
    results: Sequence[Result],
    *,
    command: str,
    model: str,
    threads: int,
    machine: Machine,
    limits: Limits | None,
    skipped: Sequence[Mapping[str, str]] = (),
) -> dict[str, object]:
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "model": os.path.basename(model.rstrip("/")),
        "threads": threads,
        "machine": asdict(machine),
        "limits": None if limits is None else asdict(limits),
        "results": [result.to_json() for result in results],
        "skipped": list(skipped),
    }


def write(path: Path, content: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


HEADER = (
    "workload",
    "engine",
    "out tok/s",
    "time s",
    "TTFT ms",
    "decode tok/s",
    "spread",
    "of limit",
    "peak MiB",
)


def show(content: Mapping[str, object]) -> None:
    """Print the results of a document as a table, whole even where stdout is no terminal."""
    shown = Table(*HEADER)
    listed = content["results"]
    assert isinstance(listed, list)
    for row in rows(listed):
        shown.add_row(*row)
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(shown)


def rows(results: Sequence[Mapping[str, object]]) -> list[tuple[str, ...]]:
    """Table rows of the results of a document, by workload, the fastest first."""

    def speed(result: Mapping[str, object]) -> float:
        median = result["median"]
        assert isinstance(median, dict)
        return -float(median["out_tok_s"] or 0)

    ordered = sorted(results, key=lambda r: (str(r["workload"]), speed(r)))
    return [_row(result) for result in ordered]


def _row(result: Mapping[str, object]) -> tuple[str, ...]:
    median, runs = result["median"], result["runs"]
    assert isinstance(median, dict)
    assert isinstance(runs, (list, tuple))
    headline = "decode_tok_s" if median["decode_tok_s"] is not None else "out_tok_s"
    values = [run[headline] for run in runs]
    share = result["share_of_bound"]
    return (
        str(result["workload"]),
        str(result["engine"]) + ("" if result["sane"] in (True, None) else " (wrong answer)"),
        _figure(median["out_tok_s"]),
        _figure(median["total_s"], 2),
        _figure(median["ttft_ms"]),
        _figure(median["decode_tok_s"]),
        f"{min(values):.0f}-{max(values):.0f}" if values else "-",
        "-" if share is None else f"{100 * float(str(share)):.0f} %",
        _figure(result["peak_rss_mb"], 0),
    )


def _figure(value: object, digits: int = 1) -> str:
    return "-" if value is None else f"{float(str(value)):.{digits}f}"
