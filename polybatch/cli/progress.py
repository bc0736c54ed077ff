"""What a batch run shows while it runs and when it is over, on stderr.

A terminal gets a bar; anything else a line every ten seconds, so that logs stay readable.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from polybatch.jobs.results import Progress

REFRESH_S = 0.2
LINE_INTERVAL_S = 10.0
MAX_MODELS_SHOWN = 20
MAX_EXAMPLE_CHARS = 300


class ProgressDisplay:
    """Call it with the progress after every step; a context manager that restores the terminal."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self._console, self._quiet = console, quiet
        self._interval_s = REFRESH_S if console.is_terminal else LINE_INTERVAL_S
        self._shown_s = time.monotonic() if not console.is_terminal else 0.0
        self._bar: Bar | None = None
        self._task = TaskID(0)

    def __enter__(self) -> ProgressDisplay:
        if self._console.is_terminal and not self._quiet:
            self._bar = Bar(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                console=self._console,
                auto_refresh=False,
            )
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        is_last = progress.done == progress.total
        if self._quiet or (now - self._shown_s < self._interval_s and not is_last):
            return
        self._shown_s = now
        if self._bar is not None:
            self._bar.update(
                self._task, total=progress.total, completed=progress.done, description=describe(progress)
            )
            self._bar.refresh()
        else:
            line = f"{progress.done:,}/{progress.total:,} rows  {describe(progress)}"
            self._console.print(line, soft_wrap=True, highlight=False)


def describe(progress: Progress) -> str:
    """Rates of this run so far and the time left, in one line."""
    seconds = max(progress.elapsed_s, 1e-9)
    left = progress.left_s
    parts = [
        f"{progress.prompt_tokens / seconds:,.0f} tok/s in",
        f"{progress.output_tokens / seconds:,.0f} out",
        f"{progress.hit_rate:.0%} cached",
    ]
    if progress.errors:
        parts.append(f"errors: {progress.errors:,}")
    parts.append("time left ?" if left is None else f"{duration(left)} left")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """7s, 2m05s or 3h12m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def show_examples(console: Console, examples: Sequence[str]) -> None:
    """What is wrong with some of the lines, if any are; the output has the rest."""
    if examples:
        console.print("lines that are wrong, for example:", highlight=False)
    for text in examples:
        shown = text if len(text) <= MAX_EXAMPLE_CHARS else f"{text[: MAX_EXAMPLE_CHARS - 1]}…"
        console.print(f"  {shown}", soft_wrap=True, highlight=False, markup=False)


def summary_table(progress: Progress, output: str) -> Table:
    """The table at the end of a run: the whole job's rows, this run's tokens and rates."""
    seconds = max(progress.elapsed_s, 1e-9)
    table = Table(title=f"{output}", show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right")
    table.add_row("rows with a result", f"{progress.ok:,}")
    table.add_row("rows with an error", f"{progress.errors:,}", style="yellow" if progress.errors else "")
    if progress.done < progress.total:
        table.add_row("rows left", f"{progress.total - progress.done:,}", style="yellow")
    if progress.done_before:
        table.add_row("rows from earlier runs", f"{progress.done_before:,}")
    table.add_row("prompt tokens", f"{progress.prompt_tokens:,} ({progress.prompt_tokens / seconds:,.0f}/s)")
    table.add_row("  from the prefix cache", f"{progress.cached_tokens:,} ({progress.hit_rate:.0%})")
    table.add_row("output tokens", f"{progress.output_tokens:,} ({progress.output_tokens / seconds:,.0f}/s)")
    table.add_row("preemptions", f"{progress.preemptions:,}")
    table.add_row("seconds", f"{progress.elapsed_s:,.1f}")
    table.add_section()
    for name, rows in progress.rows_by_model.most_common(MAX_MODELS_SHOWN):
        table.add_row(f"rows by {name}", f"{rows:,}")
    if (more := len(progress.rows_by_model) - MAX_MODELS_SHOWN) > 0:
        table.add_row(f"and {more:,} more names", "")
    return table
