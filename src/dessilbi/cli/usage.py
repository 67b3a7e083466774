# SPDX-License-Identifier: Apache-2.0
"""Usage: what is wrong with the words of a command, in one sentence like every other error."""

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from dessilbi.cli.terminal import fail

# Of click, which typer may bring along under a name of its own.
UsageError: type[Any] = typer.BadParameter.__mro__[1]


class Commands(TyperGroup):
    """The commands; their help is typer's, their errors are ours."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run a command and leave with its exit code."""
        options = {**extra, "standalone_mode": False}  # else typer exits, after drawing a box
        if not standalone_mode:
            return super().main(*args, **options)
        try:
            code = super().main(*args, **options)
        except UsageError as error:
            if not error.format_message():  # no arguments: the help has been asked for
                error.show()
                sys.exit(2)
            told = " ".join(error.format_message().split()).rstrip(".")
            where = error.ctx.command_path if error.ctx is not None else "dessilbi"
            raise SystemExit(fail(f"{told}; see {where} --help", 2).exit_code) from None
        except typer.Abort:
            raise SystemExit(fail("interrupted", 130).exit_code) from None
        sys.exit(code if type(code) is int else 0)
