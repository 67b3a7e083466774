# SPDX-License-Identifier: Apache-2.0
"""The terminal: how every command reads its options, prints, fails and is interrupted.

Exit codes: 0 done, 1 failed, 2 bad usage, 130 and 143 interrupted. Errors are one sentence on
standard error, never a traceback.
"""

import functools
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console

from dessilbi.runs import TrainingError
from dessilbi.storage import to_json
from dessilbi.training.recipes import RecipeError

P = ParamSpec("P")
DATA_VARIABLE = "DESSILBI_DATA"

DataOption = Annotated[
    str | None,
    typer.Option("--data", help=f"Folder of the data sets; by default ${DATA_VARIABLE}."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print strict JSON instead.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe's value.")
]
RunArgument = Annotated[FilePath, typer.Argument(help="A run folder.", metavar="RUN")]


class _Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


def _on_sigterm(*_: object) -> None:
    raise _Terminated("terminated")


def speaks() -> bool:
    """Whether this process speaks for all those that torchrun started: the first does."""
    return os.environ.get("RANK", "0") == "0"


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    if speaks():
        typer.echo(f"warning: {_printable(str(message))}", err=True)


def fail(error: object, code: int) -> typer.Exit:
    """Print an error and return the exit to raise."""
    told = _printable(_sentence(error))
    if speaks():
        typer.echo(f"error: {told}", err=True)
    elif isinstance(error, OSError):  # all else is the same in every process
        typer.echo(f"error in process {os.environ['RANK']}: {told}", err=True)
    return typer.Exit(code)


def _sentence(error: object) -> str:
    """One sentence, with how to go on where the error carries it as a note."""
    notes: list[str] = getattr(error, "__notes__", [])
    if not isinstance(error, OSError) or error.errno is None or error.strerror is None:
        return "; ".join([str(error), *notes])
    where = f" {error.filename}" if error.filename else ""
    advice = notes or [
        "what was already written is kept, name a place that works with --out and start again"
    ]
    return "; ".join([f"could not read or write{where}: {error.strerror}", *advice])


def _printable(text: str) -> str:
    """Keep what files and their names say from moving the cursor or breaking the line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn what a command raises into one sentence and an exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        signal.signal(signal.SIGTERM, _on_sigterm)
        warnings.showwarning = _show_warning
        try:
            command(*args, **kwargs)
        except _Terminated:
            raise fail("terminated; what was already written is kept", 143) from None
        except KeyboardInterrupt:
            raise fail("interrupted; what was already written is kept", 130) from None
        except OSError as error:
            raise fail(error, 1) from None
        except (ValueError, ImportError, TrainingError) as error:
            raise fail(error, 2 if isinstance(error, RecipeError) else 1) from None

    return run


def data_root(data: str | None) -> str | None:
    """Return the folder of the data sets: the option, else the environment variable."""
    return data or os.environ.get(DATA_VARIABLE) or None


def console() -> Console:
    """Return a console that is 80 columns wide where standard output is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 80, highlight=False)


def print_json(value: dict[str, Any]) -> None:
    """Print strict JSON."""
    typer.echo(to_json(value))
