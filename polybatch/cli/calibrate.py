"""`polybatch calibrate`: how long steps take on this machine, as a cost model that engines load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from polybatch.cli.options import STUB_MODEL, EngineOptions, with_engine
from polybatch.errors import ConfigError

if TYPE_CHECKING:
    from polybatch.scheduling.cost_profile import CostProfile


@with_engine
def calibrate(
    engine: EngineOptions,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Another JSON file to write the profile to.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1.0, help="After about so long no step is measured again.")
    ] = 90.0,
) -> None:
    """Measure steps of all kinds and fit a cost model of this machine, model and precision to them.

    Decodes of several sizes and contexts, prefills, mixed steps, random adapters and those given, and their
    loads, through the real engine. The profile goes to the cache directory, where engines with the same
    model, precision and device find it. "P95 error" is of random steps that the fit did not see.
    """
    if engine.chosen_model() == STUB_MODEL:
        raise ConfigError(f"--model is {STUB_MODEL!r}, which computes nothing: name a real model")
    from contextlib import closing

    from polybatch.engine.calibrate import calibrate as measure
    from polybatch.engine.cost_files import profile_path
    from polybatch.engine.llm import LLM
    from polybatch.scheduling.cost_profile import save_profile

    errors = Console(stderr=True, highlight=False)
    errors.print(f"loading {engine.chosen_model()}", markup=False)
    columns = (
        TextColumn("measuring steps"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with closing(LLM(engine.chosen_model(), engine.adapters(), **engine.engine_settings())) as llm:
        with Progress(*columns, console=errors) as bar:
            task = bar.add_task("")
            found = measure(
                llm,
                budget_s=seconds,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        profile = found.profile(llm)
    paths = [profile_path(profile.key), *([] if out is None else [out])]
    for path in paths:
        save_profile(profile, path)
    console = Console(highlight=False)
    console.print(coefficient_table(profile))
    for line in meanings(profile):
        console.print(line, markup=False)
    for path in paths:
        errors.print(f"kept {path}", markup=False, soft_wrap=True)


_UNITS = {
    "base": "every step",
    "per_token": "a token",
    "per_token_beyond": "a token beyond the hinge, besides",
    "per_decode": "a row that decodes",
    "per_context": "1,000 tokens of KV that a decoding row reads",
    "per_shared_context": "1,000 tokens of KV read again in the same step",
    "per_pair": "1,000,000 pairs of query and key in prefills",
    "per_prefill": "a prefill chunk",
    "per_prefill_context": "1,000 tokens of KV that a prefill chunk reads",
    "per_mixed": "a step with any prefill",
    "per_head": "a step with any logits",
    "per_logit": "a row of logits",
    "per_adapted": "a step with any adapter",
    "per_adapter": "a distinct adapter",
    "per_adapter_page": "1,000 pages of distinct adapters",
    "per_largest_page": "1,000 pages of the largest adapter",
    "per_adapter_token": "a token with an adapter",
    "per_adapter_work": "1,000 pages of adapters, counted for each token",
    "per_load_page": "1,000 pages of adapters loaded",
}
_COUNTS = (("1,000,000 ", 1_000_000), ("1,000 ", 1_000))


def coefficient_table(profile: CostProfile) -> Table:
    """Coefficients that are not 0, in milliseconds for what they are told of."""
    table = Table("coefficient", "ms", "for", box=box.SIMPLE_HEAD, show_edge=False)
    table.columns[1].justify = "right"
    for name, value in profile.coefficients.items():
        what = _UNITS[name]
        count = next((count for text, count in _COUNTS if what.startswith(text)), 1)
        if value:
            table.add_row(name, f"{value * count * 1000:,.4g}", what)
    return table


def meanings(profile: CostProfile) -> list[str]:
    """What the model says, in sentences."""
    from polybatch.scheduling.costs import StepShape

    model = profile.model

    def decode(rows: int, context: int) -> StepShape:
        return StepShape(num_tokens=rows, num_decodes=rows, decode_context=rows * context, num_logits=rows)

    def prefill(n: int) -> StepShape:
        pairs = n * (n + 1) // 2
        return StepShape(
            num_tokens=n, num_prefill_tokens=n, num_prefills=1, prefill_pairs=pairs, prefill_context=n,
            num_logits=1,
        )  # fmt: skip

    told = [f"hinge at {profile.hinge:,} tokens: beyond, a step waits for arithmetic rather than for memory"]
    for rows in (1, 32):
        ms = model.predict(decode(rows, 1000)) * 1000
        label = "row" if rows == 1 else "rows"
        told.append(f"a decode step of {rows} {label} at 1,000 tokens of context: {ms:.1f} ms")
    seconds = model.predict(prefill(512))
    told.append(f"a prefill of 512 tokens: {seconds * 1000:.1f} ms, {512 / seconds:,.0f} tokens per second")
    told.append(
        f"P95 error {profile.p95_error:.1%}, median {profile.median_error:.1%}, over {profile.num_held_out} "
        f"random steps; fitted to {profile.num_fitted} others"
    )
    if profile.num_disturbed:
        told.append(
            f"{profile.num_disturbed} steps were disturbed by other programs each time: for a better fit, "
            "run it again when the machine is idle"
        )
    return told
