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
from enum import StrEnum
from pathlib import Path as FilePath
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console

from dessilbi.columns import WIDTH, printable
from dessilbi.files.folders import RECIPE, kind_of
from dessilbi.files.runs import TrainingError
from dessilbi.files.storage import to_json
from dessilbi.training.recipes import RecipeError, recipe_names

P = ParamSpec("P")
DATA_VARIABLE = "DESSILBI_DATA"
IMAGES = (".png", ".svg", ".pdf")

DataOption = Annotated[
    str | None,
    typer.Option("--data", help=f"Folder of the data sets; by default ${DATA_VARIABLE}."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print strict JSON instead.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe's value.")
]


def _there(context: typer.Context, run: FilePath) -> FilePath:
    """Refuse what is no folder at once, before torch is loaded."""
    if not run.is_dir() and not context.resilient_parsing:  # a shell may only ask what could follow
        told = f"{run} is not a run folder: {kind_of(run, RECIPE)}"
        raise fail(f"{told}; name a folder that `dessilbi train` has written", 1)
    return run


RunArgument = Annotated[
    FilePath, typer.Argument(help="A run folder.", metavar="RUN", callback=_there)
]


class DeviceName(StrEnum):
    """Where to compute, as words of the command line."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"


def known_recipes(incomplete: str) -> list[str]:
    """The recipes whose names begin so, for the shell's completion; it adds files itself."""
    return [name for name in recipe_names() if name.startswith(incomplete)]


RecipeName = Annotated[
    str, typer.Argument(help="A recipe's name, or a TOML file.", autocompletion=known_recipes)
]
# What the commands that train have in common.
RecipeArgument = Annotated[
    str | None,
    typer.Argument(
        help="A recipe's name, or a TOML file.", show_default=False, autocompletion=known_recipes
    ),
]
OutOption = Annotated[FilePath | None, typer.Option("--out", help="The run folder to make.")]
ResumeOption = Annotated[
    FilePath | None,
    typer.Option("--resume", metavar="RUN", help="Go on with a run that was cut short."),
]
DeviceOption = Annotated[
    DeviceName | None, typer.Option("--device", help="Where to compute; by default what is there.")
]
DownloadOption = Annotated[bool, typer.Option("--download", help="Fetch missing data.")]


class _Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


def _on_sigterm(*_: object) -> None:
    raise _Terminated("terminated")


def speaks() -> bool:
    """Whether this process speaks for all those that torchrun started: the first does."""
    return os.environ.get("RANK", "0") == "0"


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    if speaks():
        typer.echo(f"warning: {printable(str(message))}", err=True)


def fail(error: object, code: int) -> typer.Exit:
    """Print an error and return the exit to raise."""
    told = printable(_sentence(error))
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


def share(value: float | None) -> float | None:
    """Refuse a density that is none, with the code of bad usage."""
    if value is not None and not 0 < value <= 1:
        raise fail(f"--density {value} is not allowed: it must be in (0, 1]", 2)
    return value


# What the commands on tickets have in common.
DensityOption = Annotated[
    float | None, typer.Option("--density", help="Share of weights to keep.", callback=share)
]
TicketOption = Annotated[
    FilePath | None, typer.Option("--ticket", help="A ticket file of this run.")
]


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
        except BrokenPipeError as error:
            if getattr(error, "__notes__", ()):  # it says how to go on
                raise fail(error, 1) from None
            # Whoever reads, head for one, has read enough: nothing of this was an error.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except OSError as error:
            raise fail(error, 1) from None
        except (ValueError, ImportError, TrainingError) as error:
            raise fail(error, 2 if isinstance(error, RecipeError) else 1) from None

    return run


def check_new(file: FilePath, what: str) -> None:
    """Refuse a place where nothing can be written, before any work is done.

    Raises:
        FileExistsError: Something is there.
        FileNotFoundError: There is no folder to write it in.
    """
    if file.exists():
        raise FileExistsError(f"{file} exists: a {what} is never overwritten; name another")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"there is no folder for {file}: make it, or name another")


def check_ending(file: FilePath) -> None:
    """Refuse what is no image by its name, with the code of bad usage."""
    if file.suffix not in IMAGES:
        raise fail(f"{file} is no image: name one that ends in {', '.join(IMAGES)}", 2)


def data_root(data: str | None) -> str | None:
    """Return the folder of the data sets: the option, else the environment variable."""
    return data or os.environ.get(DATA_VARIABLE) or None


def console() -> Console:
    """Return a console: 80 columns and no colour where standard output is not a terminal.

    Nor is there colour where NO_COLOR is set or the terminal is dumb, whatever else is set. Names
    are no markup.
    """
    is_terminal = sys.stdout.isatty()
    return Console(
        width=None if is_terminal else WIDTH,
        force_terminal=is_terminal,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        highlight=False,
        markup=False,
        emoji=False,
    )


def print_json(value: dict[str, Any]) -> None:
    """Print strict JSON."""
    typer.echo(to_json(value))
