# SPDX-License-Identifier: Apache-2.0
"""Commands that train: train, recipes."""

from enum import StrEnum
from pathlib import Path as FilePath
from typing import Annotated, Any

import typer

from dessilbi.cli.terminal import (
    DataOption,
    DeviceOption,
    DownloadOption,
    JsonOption,
    OutOption,
    RecipeArgument,
    RecipeName,
    ResumeOption,
    SetOption,
    data_root,
    fail,
    guarded,
    print_json,
    speaks,
)
from dessilbi.columns import paragraph
from dessilbi.files.runs import Run
from dessilbi.training.recipes import (
    RecipeError,
    assigned,
    load_recipe,
    recipe_names,
    validate_recipe,
)
from dessilbi.training.telling import to_toml


class StrategyName(StrEnum):
    """How processes share the work, as words of the command line."""

    DDP = "ddp"
    FSDP2 = "fsdp2"


class Calibration(StrEnum):
    """How lambda is found for a density, as words of the command line."""

    TRACK = "track"
    LATE = "late"


class OnNanName(StrEnum):
    """What is done where loss or gradient is not finite, as words of the command line."""

    STOP = "stop"
    SKIP = "skip"


@guarded
def train(
    recipe: RecipeArgument = None,
    assignments: SetOption = None,
    density: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="The density to end with; lambda is found."),
    ] = None,
    calibrate: Annotated[
        Calibration | None, typer.Option(help="How lambda is found: followed, or chosen once.")
    ] = None,
    freeze_at: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="From this share of the path on lambda is constant."),
    ] = None,
    coupling: Annotated[
        float | None,
        typer.Option(metavar="R", help="R = kappa T/nu; nu follows, ramped. 10 is good."),
    ] = None,
    data: DataOption = None,
    out: OutOption = None,
    resume: ResumeOption = None,
    parent: Annotated[
        FilePath | None,
        typer.Option("--from", metavar="RUN", help="Go on from a run, with --ticket cut out."),
    ] = None,
    ticket: Annotated[FilePath | None, typer.Option(help="A ticket file of that run.")] = None,
    stop_when_ticket: Annotated[
        bool, typer.Option("--stop-when-ticket", help="End when the support has settled.")
    ] = False,
    device: DeviceOption = None,
    strategy: Annotated[
        StrategyName | None, typer.Option(help="How processes started by torchrun share the work.")
    ] = None,
    on_nan: Annotated[
        OnNanName | None,
        typer.Option("--on-nan", help="Where loss or gradient is not finite: stop, or skip it."),
    ] = None,
    trust_checkpoint: Annotated[
        bool,
        typer.Option(
            "--trust-checkpoint",
            help="Resume a run of fsdp2: its checkpoint can execute code. Your own folders only.",
        ),
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also draw curves, into the run folder.")
    ] = False,
    download: DownloadOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe once and record its path, or go on with a run, or from one."""
    if (parent is None) != (ticket is None):
        raise fail("give --from RUN and --ticket FILE together", 2)
    if resume is not None and (parent is not None or stop_when_ticket):
        raise fail("--resume goes on with a run as it is: leave out --from and others", 2)
    told = {"density": density, "calibrate": calibrate, "freeze": freeze_at}
    if coupling is not None:
        told |= {"optimizer.nu": "auto", "optimizer.R": coupling}
    assignments = [
        *(assignments or ()),
        *(f"{key}={value}" for key, value in told.items() if value is not None),
    ]
    if on_nan is not None and resume is None:
        assignments.append(f"on_nan={on_nan.value}")
    chosen, start = _chosen(recipe, assignments, out, resume, parent), None
    from dessilbi.training import loop
    from dessilbi.training.progress import default_reporter

    if stop_when_ticket and chosen.stop is None:
        chosen = validate_recipe({**chosen.model_dump(), "stop": {}}, origin=chosen.name)
    if parent is not None and ticket is not None:
        from dessilbi.training.iterating import next_round

        chosen, start = next_round(parent, ticket, chosen, data_root=data_root(data))
    resume = resume or _restarted(chosen, out)
    options: dict[str, Any] = {
        "data_root": data_root(data),
        "reporter": default_reporter() if speaks() else None,
        "strategy": strategy.value if strategy else None,
        "draw": tensorboard,
    }
    if resume is not None:
        options |= {"on_nan": on_nan.value if on_nan else None}
        options |= {"trust_checkpoint": trust_checkpoint}
        run = loop.resume(resume, device=device.value if device else None, **options)
    else:
        asked = device.value if device else "auto"
        run = loop.train(chosen, out, device=asked, download=download, start=start, **options)
    if not speaks():
        return
    if as_json:
        print_json({"run": str(run.folder), **run.read_status()})
    else:
        _tell_early_stop(run)
        typer.echo(f"The run is in {run.folder}; see its path with: dessilbi path {run.folder}")


def _tell_early_stop(run: Run) -> None:
    """Say how many epochs a run saved that was to stop by itself."""
    told = run.read_status()
    if "epochs_saved" not in told:
        return
    if told["settled"] is None:
        typer.echo("The support never settled: all epochs were trained.")
    else:
        typer.echo(
            f"The support settled at step {told['settled']['step']}, after {told['epochs']:.3g} "
            f"epochs: {told['epochs_saved']:.3g} were saved."
        )


def _chosen(
    recipe: str | None,
    assignments: list[str],
    out: FilePath | None,
    resume: FilePath | None,
    parent: FilePath | None,
) -> Any:
    """The recipe to train; None where a run is resumed, which has its own."""
    if [recipe, resume, parent].count(None) != 2:
        raise fail("give either a recipe to train or --resume RUN, or --from RUN", 2)
    if recipe is not None:
        return load_recipe(recipe, assignments)
    if parent is not None:
        told = Run(parent).read_recipe()
        return validate_recipe(assigned(told, assignments), origin=str(parent))
    if assignments or out is not None:
        raise fail("--resume goes on with a run as it is: leave out --out and all settings", 2)
    return None


def _restarted(recipe: Any, out: FilePath | None) -> FilePath | None:
    """The run that processes had begun that torchrun has started again since; None: there is none.

    Raises:
        RecipeError: It cannot be known, or is the run of another recipe.
    """
    from dessilbi.training.engine import num_restarts

    if not num_restarts():
        return None
    if out is None:
        raise RecipeError(
            "torchrun has started this again, and which run folder it had made is not known: "
            "name one with --out, and it goes on by itself"
        )
    run = Run(out)
    if not run.recipe.exists():
        return None
    if validate_recipe(run.read_recipe(), origin=str(run.recipe)) != recipe:
        raise RecipeError(f"{out} is the run of another recipe: name another with --out")
    return out


recipes = typer.Typer(help="List the recipes, or show one in full.", invoke_without_command=True)


@recipes.callback()
@guarded
def _list(context: typer.Context) -> None:
    """List the recipes that come with the package, or show one in full."""
    if context.invoked_subcommand is None:
        names = recipe_names()
        width = max(map(len, names))
        for name in names:
            typer.echo(paragraph(load_recipe(name).summary, f"{name:{width}}  "))


@recipes.command()
@guarded
def show(
    recipe: RecipeName,
    assignments: SetOption = None,
) -> None:
    """Print every value of a recipe, as a TOML file to start one's own from."""
    typer.echo(to_toml(load_recipe(recipe, assignments or ())), nl=False)
