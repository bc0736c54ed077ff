"""`polybatch selfcheck`: do your adapters answer the same in a mixed batch as alone and merged?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polybatch.cli.options import EngineOptions, with_engine
from polybatch.errors import ConfigError

if TYPE_CHECKING:
    from polybatch.engine.selfcheck import CheckRow


@with_engine
def selfcheck(
    engine: EngineOptions,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file of your own prompts, one per line; some long, some beginning alike."),
    ] = None,
) -> None:
    """Compare every adapter in a mixed batch with itself run alone, merged, and run by peft.

    Greedy tokens and logits, in float32; against itself alone also in the precision to be served. The
    batch's token budget and pool are the check's own: so small that prompts are cut and preempted.
    Exit status 1 if any of them differ.
    """
    from polybatch.engine.selfcheck import run

    texts = None if prompts is None else _read_prompts(prompts)
    errors = Console(stderr=True, highlight=False)
    with errors.status("opening the model") as status:
        rows = run(
            engine.chosen_model(),
            engine.adapters(),
            prompts=texts,
            progress=status.update,
            report=errors.print,
            **engine.engine_settings(),
        )
    console = Console(highlight=False)
    console.print(check_table(rows))
    console.print(
        "[dim]ties: tokens that may differ, their logits being closer than 0.001; limit 0: equal bits[/]"
    )
    if not all(row.ok for row in rows):
        raise typer.Exit(1)


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path} cannot be read: {error}") from error
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise ConfigError(f"--prompts {path} has no prompts: write one per line")
    return texts


def check_table(rows: Sequence[CheckRow]) -> Table:
    """One line per adapter and reference, adapters in the order given, each named once."""
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    table.add_column("adapter", overflow="fold")
    table.add_column("compared with", no_wrap=True)
    for name in ("rows", "tokens", "differ", "ties", "max |Δ|", "limit"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("result", no_wrap=True)
    order = {name: index for index, name in enumerate(dict.fromkeys(row.adapter for row in rows))}
    shown = None
    for row in sorted(rows, key=lambda row: order[row.adapter]):
        if shown not in (None, row.adapter):
            table.add_section()
        name = "" if row.adapter == shown else escape(row.adapter)
        shown = row.adapter
        if row.note:
            table.add_row(name, row.reference, *[""] * 6, f"[dim]{row.note}[/]")
            continue
        table.add_row(
            name,
            row.reference,
            str(row.rows),
            str(row.tokens),
            str(row.token_differences),
            str(row.near_ties),
            f"{row.max_logit_difference:.1e}" if row.max_logit_difference else "0",
            f"{row.limit:g}",
            "[green]ok[/]" if row.ok else "[bold red]differs[/]",
        )
    return table
