"""A report as a table in the terminal. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from polybatch.simulate.planner import Plan, num_devices_for
from polybatch.simulate.report import Percentiles, Report

_TIMES = ("ttft", "tpot", "tbt", "e2e", "scheduling_delay")
_LABELS = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "tbt": "TBT",
    "e2e": "end to end",
    "scheduling_delay": "in the queue",
}


def times_table(report: Report, title: str = "") -> Table:
    """Percentiles of every time, in milliseconds or seconds as they fit."""
    table = Table(title=f"{title}{report.trace}", title_justify="left")
    table.add_column("")
    for name in ("mean", "P50", "P90", "P95", "P99", "max"):
        table.add_column(name, justify="right")
    for name in _TIMES:
        values: Percentiles = getattr(report, name)
        row = (values.mean, values.p50, values.p90, values.p95, values.p99, values.max)
        table.add_row(_LABELS[name], *map(seconds, row))
    return table


def totals_table(reports: Sequence[tuple[str, Report]]) -> Table:
    """Totals of one run or several side by side."""
    table = Table(title="totals", title_justify="left")
    table.add_column("")
    for label, _ in reports:
        table.add_column(label, justify="right")
    columns = [_totals(report) for _, report in reports]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def plan_table(plan: Plan) -> Table:
    """Every layout that was searched, best first."""
    table = Table(title=f"{plan.trace}: goodput", title_justify="left")
    table.add_column("layout")
    for name in ("devices", "req/s", "per device", "TTFT P90", "TPOT P90"):
        table.add_column(name, justify="right", no_wrap=True)
    if plan.rate is not None:
        table.add_column(f"for {plan.rate:g}/s", justify="right", no_wrap=True)
    for found in sorted(plan.candidates, key=lambda c: (c.is_bound, -c.per_device)):
        below = "< " if found.is_bound else ""
        times = ("", "") if found.report is None else (found.report.ttft.p90, found.report.tpot.p90)
        row = [
            found.layout.name,
            str(found.layout.num_devices),
            f"{below}{found.rate:.2f}",
            f"{below}{found.per_device:.2f}",
            *(time if isinstance(time, str) else seconds(time) for time in times),
        ]
        if plan.rate is not None:
            num = num_devices_for(found, plan.rate)
            row.append("" if num is None else str(num))
        table.add_row(*row)
    return table


def seconds(value: float | None) -> str:
    """For people: 12.3 ms, 4.56 s, - where there is none."""
    if value is None:
        return "-"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:,.2f} s"


def _totals(r: Report) -> dict[str, str]:
    return {
        "requests: done, refused, dropped": f"{r.num_completed:,}  {r.num_refused:,}  {r.num_dropped:,}",
        "simulated time": f"{r.wall_s:,.1f} s",
        "offered": f"{r.offered_rate:.2f}/s" if r.offered_rate else "all at once",
        "throughput": f"{r.throughput:.2f}/s",
        "tokens out, in": f"{r.output_tokens_per_s:,.0f}/s  {r.prompt_tokens_per_s:,.0f}/s",
        "attainment": _share(r.attainment),
        "goodput": "-" if r.goodput is None else f"{r.goodput:.2f}/s",
        "goodput per device": "-" if r.goodput_per_device is None else f"{r.goodput_per_device:.2f}/s",
        "workflows in time": _share(r.workflow_attainment),
        "answers that came true": _share(r.answers_right),
        "steps": f"{r.num_steps:,}",
        "sequences per step": f"{r.rows_per_step:.1f}",
        "busy": _share(r.busy_share),
        "preemptions": f"{r.num_preemptions:,}",
        "prompt tokens from the cache": _share(r.prefix_hit_share),
        "adapters, loads": f"{r.num_adapters:,}  {r.num_adapter_loads:,}",
        "most KV at once": f"{_share(r.peak_kv_share)} of the pool",
    }


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
