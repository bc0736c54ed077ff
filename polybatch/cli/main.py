"""The `polybatch` command: one file per subcommand, errors as one line.

Subcommands import the engine inside their functions, so that --help answers at once.
Exit status: 0 done, 1 a check failed, 2 a wrong flag, file or checkpoint, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

import typer

from polybatch import __version__
from polybatch.cli import (
    batch,
    bench,
    calibrate,
    chat,
    info,
    keys,
    plan,
    plan_job,
    selfcheck,
    serve,
    simulate,
)
from polybatch.errors import ConfigError, PolybatchError

app = typer.Typer(
    name="polybatch",
    help="Run a language model over many requests and many adapters in the same batch.",
    no_args_is_help=True,
    # Paragraphs of docstrings are filled anew for the terminal's width.
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("batch")(batch.batch)
app.command("plan-job")(plan_job.plan_job)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.add_typer(keys.app, name="keys")
app.command("info")(info.info)
app.command("bench")(bench.bench)
app.command("selfcheck")(selfcheck.selfcheck)
app.command("calibrate")(calibrate.calibrate)
app.command("simulate")(simulate.simulate)
app.command("plan")(plan.plan)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"polybatch {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """Run a language model over many requests and many adapters in the same batch."""


def _with_flags(message: str, args: Sequence[str]) -> str:
    """A ConfigError's message with the flags that were typed in place of the settings' names."""
    for arg in args:
        flag = arg.partition("=")[0]
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name.isidentifier():
            # Names of one word, such as memory, are said in sentences, too.
            pattern = rf"\b{name}\b" if "_" in name else rf"\A{name}(?= is )"
            message = re.sub(pattern, flag, message)
    return message


def main(args: Sequence[str] | None = None) -> None:
    """Entry point. Ends the process: errors that name a way out are printed without a traceback."""
    args = sys.argv[1:] if args is None else list(args)
    try:
        app(args=args)
    except PolybatchError as error:
        # Errors of checkpoints and adapters speak of what is in their files.
        message = _with_flags(str(error), args) if type(error) is ConfigError else str(error)
        print(f"polybatch: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
