# SPDX-License-Identifier: Apache-2.0
"""The command line: one function per command, each a thin call into the library.

Exit codes: 0 done, 1 failed, 2 bad usage, 130 and 143 interrupted. Errors are one sentence on
standard error, never a traceback. torch is loaded inside the commands, so that --help is quick.
"""

import functools
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from io import TextIOWrapper
from pathlib import Path as FilePath
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console

from dessilbi.runs import Run, TrainingError, free_path
from dessilbi.storage import to_json, write_json
from dessilbi.training.recipes import RecipeError, load_recipe, recipe_names

P = ParamSpec("P")


class OrderName(StrEnum):
    """The orders of ``Path.ticket``, as words of the command line."""

    DUAL = "dual"
    WEIGHT = "weight"
    ENTRY = "entry"


app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Train a network once and hold the whole family of its sparse models.",
)
DEMO_DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05)
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


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {message}", err=True)


def _fail(error: object, code: int) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(code)


def _sentence(error: OSError) -> str:
    """One sentence for a failed file operation; our own OSErrors have one already."""
    if error.errno is None or error.strerror is None:
        return str(error)
    where = f" {error.filename}" if error.filename else ""
    return (
        f"could not read or write{where}: {error.strerror}; what was already written is kept, "
        f"name a place that works with --out and start again"
    )


def _guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn what a command raises into one sentence and an exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        signal.signal(signal.SIGTERM, _on_sigterm)
        warnings.showwarning = _show_warning
        try:
            command(*args, **kwargs)
        except _Terminated:
            raise _fail("terminated; what was already written is kept", 143) from None
        except KeyboardInterrupt:
            raise _fail("interrupted; what was already written is kept", 130) from None
        except OSError as error:
            raise _fail(_sentence(error), 1) from None
        except (ValueError, ImportError, TrainingError) as error:
            raise _fail(error, 2 if isinstance(error, RecipeError) else 1) from None

    return run


def _data_root(data: str | None) -> str | None:
    return data or os.environ.get(DATA_VARIABLE) or None


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 80, highlight=False)


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(to_json(value))


@app.command()
@_guarded
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a TOML file.")],
    assignments: SetOption = None,
    data: DataOption = None,
    out: Annotated[FilePath | None, typer.Option(help="The run folder to make.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch missing data.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe once and record its path."""
    chosen = load_recipe(recipe, assignments or ())
    from dessilbi.training.loop import train as train_recipe
    from dessilbi.training.progress import default_reporter

    folder = out or free_path("runs", chosen.name)
    run = train_recipe(
        chosen,
        folder,
        data_root=_data_root(data),
        download=download,
        reporter=default_reporter(),
    )
    if as_json:
        _print_json({"run": str(run.folder), **run.read_status()})
    else:
        typer.echo(f"The run is in {run.folder}; see its path with: dessilbi path {run.folder}")


@app.command()
@_guarded
def path(
    run: RunArgument,
    figure: Annotated[
        FilePath | None, typer.Option(help="Also draw it (.svg, .png or .pdf).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the path of a run: accuracy against density, from simple to complex."""
    from dessilbi.reporting.figures import save_path_figure
    from dessilbi.reporting.summary import summarise
    from dessilbi.reporting.tables import path_table

    summary = summarise(run)
    if figure is not None:
        save_path_figure(summary, figure)
    if as_json:
        _print_json(summary.to_json())
    else:
        _console().print(path_table(summary))


@app.command()
@_guarded
def ticket(
    run: RunArgument,
    density: Annotated[float | None, typer.Option(help="Share of weights to keep.")] = None,
    step: Annotated[int | None, typer.Option(help="What had entered by this step.")] = None,
    order: Annotated[OrderName, typer.Option(help="How blocks are ranked.")] = OrderName.DUAL,
    out: Annotated[FilePath | None, typer.Option(help="The file to write.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Take one member of the family and save it as a ticket file."""
    from dessilbi.path import Path

    if (density is None) == (step is None):
        raise _fail("give exactly one of --density and --step", 2)
    if density is not None and not 0 < density <= 1:
        raise _fail(f"--density {density} is not allowed: it must be in (0, 1]", 2)
    if out is not None and out.exists():
        raise FileExistsError(f"{out} exists: a ticket is never overwritten; name another --out")
    chosen = Path.load(run).ticket(density=density, step=step, order=order.value)
    file = out or _ticket_file(Run(run), density, step)
    chosen.save(file)
    if as_json:
        facts = {"density": chosen.density, "file": str(file), "layers": chosen.densities()}
        _print_json({**chosen.origin, **facts})
    else:
        typer.echo(f"{chosen}\nsaved as {file}")


def _ticket_file(run: Run, density: float | None, step: int | None) -> FilePath:
    run.tickets.mkdir(exist_ok=True)
    name = f"step-{step}" if density is None else f"density-{density:g}"
    return free_path(run.tickets, name, ".safetensors")


@app.command()
@_guarded
def recipes() -> None:
    """List the recipes that come with the package."""
    for name in recipe_names():
        typer.echo(f"{name:24} {load_recipe(name).summary}")


@app.command()
@_guarded
def doctor(data: DataOption = None) -> None:
    """Say what is installed, which devices and data there are, and whether runs can be written."""
    from dessilbi.reporting.doctor import findings

    for name, value in findings(_data_root(data)):
        typer.echo(f"{name:12} {value}")


@app.command()
@_guarded
def demo(
    out: Annotated[FilePath | None, typer.Option(help="The run folder to make.")] = None,
) -> None:
    """Train LeNet on digits once, show its path and what its tickets are worth."""
    from dessilbi.path import Path
    from dessilbi.reporting.summary import summarise
    from dessilbi.reporting.tables import outcome_table, path_table
    from dessilbi.training.finetune import judge_tickets, load_trained
    from dessilbi.training.loop import train as train_recipe
    from dessilbi.training.progress import default_reporter

    recipe = load_recipe("digits-lenet")
    run = train_recipe(recipe, out or free_path("runs", "demo"), reporter=default_reporter())
    console = _console()
    console.print(path_table(summarise(run.folder)))
    trained = load_trained(run)
    outcomes = judge_tickets(trained, Path.load(run.folder), DEMO_DENSITIES)
    write_json(run.family, {"accuracy": trained.accuracy, "tickets": [asdict(o) for o in outcomes]})
    console.print(outcome_table(outcomes, trained.accuracy, recipe.finetune.epochs))
    typer.echo(f"The run folder is {run.folder}; take a ticket with:")
    typer.echo(f"  dessilbi ticket {run.folder} --density 0.1")


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
            stream.reconfigure(errors="replace")  # a terminal without Greek letters shows "?"
    app(prog_name="dessilbi")
