"""`polybatch selfcheck`: do your adapters answer the same in a mixed batch as alone and merged?"""

from __future__ import annotations

from dataclasses import fields

import typer
from rich.console import Console
from rich.table import Table

from polybatch.cli.options import EngineOptions, with_engine


@with_engine
def selfcheck(engine: EngineOptions) -> None:
    """Compare every adapter in a mixed batch with itself run alone and with merged weights.

    Exit status 1 if any of them differ.
    """
    from polybatch.engine.selfcheck import run

    rows = run(engine.chosen_model(), engine.adapters(), **engine.engine_settings())
    table = Table()
    for column in fields(rows[0]):
        table.add_column(column.name.replace("_", " "))
    for row in rows:
        values = [getattr(row, column.name) for column in fields(row)]
        table.add_row(*(f"{v:.2e}" if isinstance(v, float) else str(v) for v in values))
    Console().print(table)
    if not all(row.ok for row in rows):
        raise typer.Exit(1)
