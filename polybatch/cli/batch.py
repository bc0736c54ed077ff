"""`polybatch batch`: a file of OpenAI batch lines in, a file of answers out, resumable at any moment."""

from __future__ import annotations

import hashlib
import signal
import sys
import types
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from polybatch.cli.options import ChatTemplate, EngineOptions, with_engine
from polybatch.cli.progress import ProgressDisplay, show_examples, summary_table
from polybatch.cli.remote import api_key_of, refuse_engine_flags, run_batch
from polybatch.errors import ConfigError
from polybatch.jobs.job import Job, open_job, weights_fingerprint
from polybatch.jobs.results import Progress
from polybatch.jobs.runner import PLANNED, ModelNames, Runner, Window
from polybatch.jobs.tools.styles import check_style
from polybatch.scheduling.policies import POLICIES, policy_named

_SERVER = "Through a server"

LOOK_AHEAD = 2
"""Completions kept in the engine per one that can run, so that a batch never runs dry."""

DEFAULT_POLICY = "prefix_groups"


@with_engine
def batch(
    engine: EngineOptions,
    input_path: Annotated[
        Path, typer.Option("--input", "-i", metavar="IN.jsonl", help="Requests, one JSON object per line.")
    ],
    output_path: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="OUT.jsonl", help="Answers; OUT.jsonl.journal.sqlite beside."),
    ],
    resume: Annotated[
        bool, typer.Option(help="Continue an output that exists; --no-resume refuses it.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Drop an earlier output and start over.")
    ] = False,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name for the base model in the input; repeat for more."),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            rich_help_panel=_SERVER,
            help="Have a running server answer, instead of an engine here.",
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(rich_help_panel=_SERVER, help="Better in the environment, as POLYBATCH_API_KEY."),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(rich_help_panel=_SERVER, min=1, help="Requests under way at once.")
    ] = 64,
    scheduling_policy: Annotated[
        str | None,
        typer.Option(
            help=f"Default {DEFAULT_POLICY}. "
            + "; ".join(f"{name}: {policy.summary}" for name, policy in POLICIES.items())
        ),
    ] = None,
    tool_call_parser: Annotated[
        str | None,
        typer.Option(
            help="How the model writes tool calls: hermes, llama3_json or mistral. Default: by its template."
        ),
    ] = None,
    chat_template: ChatTemplate = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show nothing but errors.")] = False,
) -> None:
    """Run every request of a file and write every answer.

    IN.jsonl holds OpenAI batch lines: {"custom_id": "1", "method": "POST", "url":
    "/v1/chat/completions", "body": {"model": ..., "messages": [...]}}; url may also be
    /v1/completions, and model names the base model or an adapter.

    Stop it with Ctrl-C, kill it, pull the plug: the same command goes on where it stopped, with no
    row lost or repeated. Lines that are wrong become error lines of the output.

    Rows with common beginnings run together, wherever they stand in the file; answers are written as
    they come. polybatch plan-job tells beforehand what that saves.

    With --server URL the same happens through a server that speaks OpenAI's interface.

    Exit status 0 once every line has an answer or an error line.
    """
    console = Console(stderr=True)
    if server is not None:
        _refuse_servers_choice(
            served_model_name=served_model_name, scheduling_policy=scheduling_policy,
            tool_call_parser=tool_call_parser, chat_template=chat_template,
        )  # fmt: skip
        refuse_engine_flags(engine)
        with ProgressDisplay(console, quiet) as display:
            progress, stopped_by = run_batch(
                server, api_key_of(api_key), input_path, output_path, resume=resume, overwrite=overwrite,
                concurrency=concurrency, report=display,
                begun=lambda job: _say_continued(job, console, quiet),
            )  # fmt: skip
        if stopped_by:
            raise typer.Exit(_explain_stop(console, progress, output_path, stopped_by, overwrite))
        if not quiet:
            _show_summary(console, progress, output_path)
        return
    if tool_call_parser is not None:
        check_style(tool_call_parser)
    model, adapters = engine.chosen_model(), engine.adapters()
    names = ModelNames((model, *(served_model_name or ())), tuple(adapters))
    if clash := set(names.base) & set(adapters):
        raise ConfigError(f"--served-model-name {clash.pop()} is also an adapter's name: choose another")
    facts = _facts(engine, tool_call_parser, chat_template)
    with closing(open_job(input_path, output_path, facts, resume=resume, overwrite=overwrite)) as job:
        total, ok, errors = job.journal.counts()
        if ok + errors == total:
            progress = Progress(total, ok, errors, done_before=ok + errors)
        else:
            _say_continued(job, console, quiet)
            progress, stopped_by = _run(
                job, engine, names, console, quiet, policy=scheduling_policy or DEFAULT_POLICY,
                tool_call_parser=tool_call_parser, chat_template=chat_template,
            )  # fmt: skip
            if stopped_by:
                raise typer.Exit(_explain_stop(console, progress, output_path, stopped_by, overwrite))
        if not quiet:
            _show_summary(console, progress, output_path)


def _show_summary(console: Console, progress: Progress, output: Path) -> None:
    console.print(summary_table(progress, str(output)))
    show_examples(console, progress.examples)


def _say_continued(job: Job, console: Console, quiet: bool) -> None:
    total, ok, errors = job.journal.counts()
    if job.was_resumed and not quiet and ok + errors < total:
        note = f"continuing {job.output.path}: {ok + errors:,} of {total:,} rows are done"
        console.print(note, soft_wrap=True, highlight=False, markup=False)


def _refuse_servers_choice(**flags: object) -> None:
    for name, value in flags.items():
        if value:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} is the server's to choose: leave it out beside --server")


def _facts(engine: EngineOptions, tool_call_parser: str | None, chat_template: str | None) -> dict[str, str]:
    """What besides the input changes answers; a job is continued only with the same."""
    chosen: dict[str, str] = {}
    if tool_call_parser is not None:
        chosen["tool_call_parser"] = tool_call_parser
    if chat_template is not None:
        from polybatch.engine.chat_templates import template_source

        chosen["chat_template"] = hashlib.sha256(template_source(chat_template).encode()).hexdigest()
    adapters = (f"{name}={weights_fingerprint(path)}" for name, path in sorted(engine.adapters().items()))
    return {
        "model": weights_fingerprint(engine.chosen_model()),
        "adapters": " ".join(adapters) or "none",
        "dtype": engine.dtype,
        "quantization": engine.quantization or "none",
        "max_model_len": str(engine.max_model_len or "auto"),
        "seed": str(engine.seed),
    } | chosen


def _run(
    job: Job,
    engine: EngineOptions,
    names: ModelNames,
    console: Console,
    quiet: bool,
    *,
    policy: str,
    tool_call_parser: str | None,
    chat_template: str | None,
) -> tuple[Progress, int | None]:
    """Load the model and run; returns the progress and the signal that stopped it, if one did."""
    from polybatch.cli.engines import open_core

    window = PLANNED if policy_named(policy).is_planning else Window(LOOK_AHEAD * engine.max_num_seqs)
    with open_core(engine, console, quiet, policy=policy, chat_template=chat_template) as core:
        runner = Runner(job, core, names, window, tokenizer=core.tokenizer, tool_call_parser=tool_call_parser)
        with ProgressDisplay(console, quiet) as display, _stop_signals() as received:
            runner.run(should_stop=lambda: bool(received), report=display)
    unfinished = runner.progress.done < runner.progress.total
    return runner.progress, received[0] if received and unfinished else None


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that the step in progress ends and its results are kept.

    A second one acts at once; nothing is lost by that either.
    """
    received: list[int] = []

    def note(number: int, frame: types.FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _explain_stop(
    console: Console, progress: Progress, output: Path, stopped_by: int, was_overwriting: bool
) -> int:
    again = "without --overwrite " if was_overwriting else ""
    console.print(
        f"stopped: {progress.done:,} of {progress.total:,} rows are in {output}. "
        f"Run the same command again {again}to go on.",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    sys.stderr.flush()
    return 128 + stopped_by
