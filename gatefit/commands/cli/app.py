"""The `gatefit` command.

Nothing here imports PyTorch: help, completion and `--version` answer at once. Each command imports what it needs.
"""

from typing import Annotated

import typer

from gatefit.commands.cli.bench import bench
from gatefit.commands.cli.convert import convert
from gatefit.commands.cli.deploy import deploy
from gatefit.commands.cli.evaluate import evaluate
from gatefit.commands.cli.inspect import inspect
from gatefit.commands.cli.models import models
from gatefit.commands.cli.report import report
from gatefit.commands.cli.session import keep_memory
from gatefit.version import __version__

app = typer.Typer(
    help="Turn a trained network into one that runs only the blocks and channels each image needs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (convert, inspect, models, evaluate, report, deploy, bench):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gatefit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Turn a trained network into one that runs only the blocks and channels each image needs."""


def main() -> None:
    """Run the `gatefit` command."""
    keep_memory()
    app()
