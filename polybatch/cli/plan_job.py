"""`polybatch plan-job`: what a batch file will take and what sharing prefixes saves, before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from polybatch.cli.info import show_bytes
from polybatch.cli.options import ChatTemplate, EngineOptions, with_engine
from polybatch.cli.progress import show_examples
from polybatch.errors import ConfigError, RequestError
from polybatch.jobs.lines import Line, parse_line, read_lines
from polybatch.jobs.results import note_example
from polybatch.jobs.runner import ModelNames
from polybatch.jobs.tools.answer import template_variables
from polybatch.request import AdapterRef, Request

if TYPE_CHECKING:
    from polybatch.config import PoolSpec, SchedulerConfig
    from polybatch.engine.door import Door
    from polybatch.jobs.plan import JobPlan
    from polybatch.scheduling.costs import StepCosts


@with_engine
def plan_job(
    engine: EngineOptions,
    input_path: Annotated[
        Path, typer.Argument(metavar="IN.jsonl", help="Requests, one JSON object per line.")
    ],
    expected_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Output tokens of a completion whose row does not say; default its max_tokens."
        ),
    ] = None,
    chat_template: ChatTemplate = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name for the base model in the input; repeat for more."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Tell what a batch file will take: tokens computed and saved, pages, time. Loads no weights.

    Compares the plan that polybatch batch follows with the file's own order and a cache of the same size.
    Time needs a cost model of this machine, which polybatch calibrate makes.
    """
    from polybatch.jobs.plan import plan_job as plan

    if not input_path.is_file():
        raise ConfigError(f"input {input_path} is not a file")
    door, config, pool, costs = _machine(engine, chat_template)
    names = ModelNames((engine.chosen_model(), *(served_model_name or ())), tuple(engine.adapters()))
    wrong: list[str] = []
    requests_of = _reader(door, names, _adapter_refs(engine, pool), expected_tokens, wrong)
    with open(input_path, "rb") as stream:
        found = plan(read_lines(stream), requests_of, config, pool, costs)
    if json_output:
        typer.echo(json.dumps(found.as_dict()))
        return
    console = Console()
    console.print(_table(found))
    show_examples(console, wrong)
    if found.seconds is None:
        console.print(
            "no time in seconds: polybatch calibrate with the same model and flags measures this machine",
            highlight=False,
        )


def _machine(
    engine: EngineOptions, chat_template: str | None
) -> tuple[Door, SchedulerConfig, PoolSpec, StepCosts | None]:
    """Tokenizer and limits, scheduler, pages and costs of the engine that these flags would open."""
    from polybatch.engine.chat_templates import with_template
    from polybatch.engine.stub import is_stub

    if is_stub(engine.chosen_model()):
        from polybatch.cli.engines import refuse_stub_template, stub_core
        from polybatch.config import SchedulerConfig

        refuse_stub_template(chat_template)
        core = stub_core(engine)
        config = SchedulerConfig(
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens or 2048,
            max_model_len=core.max_model_len,
        )
        return core.door, config, core.executor.pool, None
    from polybatch.engine.config import EngineConfig, adapter_bytes, resolve_dtype
    from polybatch.engine.cost_files import cost_key, costs_for
    from polybatch.engine.door import Door
    from polybatch.engine.executors import settle
    from polybatch.models.loader import load_model

    model = engine.chosen_model()
    asked = EngineConfig(**engine.engine_settings())
    loaded = load_model(model)
    settled = settle(asked, loaded.spec, adapter_bytes(engine.adapters().values(), resolve_dtype(asked)))
    costs = costs_for(cost_key(settled, model, loaded.fingerprint))
    tokenizer = with_template(loaded.tokenizer, chat_template)
    pool = settled.pool
    pool_tokens = pool.num_pages * pool.page_size
    door = Door(loaded.spec, settled.scheduler.max_model_len, tokenizer, pool_tokens=pool_tokens)
    return door, settled.scheduler, pool, costs if costs.is_ready else None


def _adapter_refs(engine: EngineOptions, pool: PoolSpec) -> dict[str, AdapterRef]:
    """Adapters by name, their pages judged by their files' sizes."""
    from polybatch.engine.config import adapter_bytes

    page_bytes = pool.page_bytes * pool.num_layers
    dtype = "float32" if engine.dtype == "float32" else "bfloat16"
    return {
        name: AdapterRef(name, name, max(1, -(-adapter_bytes([path], dtype) // page_bytes)))
        for name, path in engine.adapters().items()
    }


def _reader(
    door: Door,
    names: ModelNames,
    refs: dict[str, AdapterRef],
    expected_tokens: int | None,
    wrong: list[str],
) -> Callable[[Line], Sequence[Request]]:
    """Lines to requests, refused as the runner and the door refuse them. wrong: takes examples of that."""

    def requests_of(line: Line) -> list[Request]:
        try:
            return read(line)
        except RequestError as error:
            note_example(wrong, f"line {line.number}: {error}")
            raise

    def read(line: Line) -> list[Request]:
        call = parse_line(line)
        adapter = names.adapter_of(call.model)
        ref = None if adapter is None else refs[adapter]
        prompts = call.prompts or (door.encode_chat(call.messages, **template_variables(call)),)
        requests = [door.prepare(f"{line.number}.{k}", p, call.params) for k, p in enumerate(prompts)]
        expected = call.expected_tokens or expected_tokens
        return [replace(r, adapter=ref, expected_tokens=expected, prompt=None) for r in requests]

    return requests_of


def _table(plan: JobPlan) -> Table:
    table = Table(title="Plan", title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    windows = f", planned in {plan.windows} windows" if plan.windows > 1 else ""
    bad = f", {plan.bad_lines:,} lines are wrong" if plan.bad_lines else ""
    rows = {
        "rows": f"{plan.rows:,}{bad}{windows}",
        "completions": f"{plan.completions:,}, {plan.output_tokens:,} output tokens expected",
        "groups": f"{plan.groups:,} with {plan.rows_in_groups:,} rows; {plan.adapters:,} adapters",
        "prompt tokens": f"{plan.prompt_tokens:,}",
        "computed by the plan": f"{plan.planned_tokens:,}, {plan.saving:.1%} saved, the most that can be",
        "in the file's order": f"{plan.lru_tokens:,}, {plan.lru_saving:.1%} saved by a cache of that size",
        "one level of prefixes": f"{plan.one_level_tokens:,}",
        "pages at once": f"{plan.peak_pages:,} of {plan.pool_pages:,}, {show_bytes(plan.peak_bytes)} "
        f"of {show_bytes(plan.pool_bytes)}",
        "steps": f"{plan.steps:,}",
    }
    if plan.seconds is not None:
        rows["time"] = f"{plan.seconds:,.0f} s"
    for name, value in rows.items():
        table.add_row(name, value)
    return table
