"""`polybatch keys`: API keys of tenants."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polybatch.errors import ConfigError

app = typer.Typer(
    help="Manage the API keys that `polybatch serve --api-keys FILE` takes.", no_args_is_help=True
)


@app.command("new")
def new(
    tenant: Annotated[str, typer.Option(help="Whose key it is; a tenant may have several.")],
    file: Annotated[Path, typer.Option(help="The file of keys; made if it does not exist.")] = Path(
        "keys.txt"
    ),
    admin: Annotated[bool, typer.Option("--admin", help="For loading adapters and the like, too.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="For /metrics and /ready alone.")] = False,
) -> None:
    """Make a key, append its hash to the file and print it, this once.

    A server that runs takes it after: kill -HUP PID
    """
    try:
        from polybatch.server.key_file import Role, add_key
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'polybatch[serve]'") from error
    if admin and metrics:
        raise ConfigError("--admin and --metrics are different keys: make two")
    typer.echo(add_key(file, tenant, Role.ADMIN if admin else Role.METRICS if metrics else Role.TENANT))


@app.callback()
def keys() -> None:
    """Keep this a group, whatever the number of its commands."""
