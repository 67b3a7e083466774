# SPDX-License-Identifier: Apache-2.0
"""The command line: one function per command, each a thin call into the library.

torch is loaded inside the commands, so that --help is quick.
"""

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from dessilbi.cli.checking import doctor
from dessilbi.cli.compaction import compact, export, verify
from dessilbi.cli.family import path, ticket
from dessilbi.cli.growing import grow
from dessilbi.cli.models import plan
from dessilbi.cli.reporting import report
from dessilbi.cli.retraining import prune_curve, retrain
from dessilbi.cli.seeing import filters
from dessilbi.cli.tour import demo
from dessilbi.cli.training import recipes, train
from dessilbi.cli.usage import Commands
from dessilbi.columns import SPELLED

COMMANDS = {
    "Begin": (demo, doctor, plan),
    "Train": (train, grow),
    "See": (path, report, filters, prune_curve),
    "Choose and train again": (ticket, retrain),
    "Ship": (compact, export, verify),
}

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Train a network once and hold the whole family of its sparse models.",
)
for panel, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.add_typer(recipes, name="recipes", rich_help_panel="Begin")


def _version(wanted: bool) -> None:
    if wanted:
        from dessilbi import __version__

        typer.echo(f"dessilbi {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train a network once and hold the whole family of its sparse models."""


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=SPELLED)  # a terminal without Greek letters shows G for Gamma
    app(prog_name="dessilbi")
