# SPDX-License-Identifier: Apache-2.0
"""Commands on networks that change their size: grow."""

from typing import Annotated, Any

import typer

from dessilbi.cli.terminal import (
    DataOption,
    DeviceOption,
    DownloadOption,
    JsonOption,
    OutOption,
    RecipeArgument,
    ResumeOption,
    SetOption,
    console,
    data_root,
    fail,
    guarded,
    print_json,
)
from dessilbi.files.runs import Run
from dessilbi.files.storage import read_lines
from dessilbi.training.recipes import Recipe, RecipeError, load_recipe, recipe_names


@guarded
def grow(
    recipe: RecipeArgument = None,
    assignments: SetOption = None,
    target_accuracy: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Stop growing at this validation accuracy."),
    ] = None,
    max_params: Annotated[int | None, typer.Option(help="Never more parameters.")] = None,
    max_macs: Annotated[int | None, typer.Option(help="Never more MACs for one sample.")] = None,
    max_width: Annotated[int | None, typer.Option(help="Never more in a layer.")] = None,
    max_rounds: Annotated[int | None, typer.Option(help="Never more checks.")] = None,
    data: DataOption = None,
    out: OutOption = None,
    resume: ResumeOption = None,
    device: DeviceOption = None,
    download: DownloadOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a network that starts narrow and widens where its support asks for it."""
    told = {
        "target_accuracy": target_accuracy,
        "max_params": max_params,
        "max_macs": max_macs,
        "max_width": max_width,
        "max_rounds": max_rounds,
    }
    given = [f"grow.{name}={value}" for name, value in told.items() if value is not None]
    if (recipe is None) == (resume is None):
        raise fail("give either a recipe to grow or --resume RUN", 2)
    if resume is not None and (assignments or given or out is not None):
        raise fail("--resume goes on with a run as it is: leave out --out and all settings", 2)
    chosen = None if recipe is None else _growing(recipe, [*(assignments or ()), *given])
    from dessilbi.training import loop
    from dessilbi.training.progress import default_reporter

    options: dict[str, Any] = {"data_root": data_root(data), "reporter": default_reporter()}
    if chosen is not None:
        asked = device.value if device else "auto"
        run = loop.train(chosen, out, device=asked, download=download, **options)
    else:
        assert resume is not None
        run = loop.resume(resume, device=device.value if device else None, **options)
    _tell(run, as_json=as_json)


def _growing(name: str, assignments: list[str]) -> Recipe:
    """Load a recipe that grows."""
    # Asked of the recipe as it is: a cap on the command line does not make it one that grows.
    if load_recipe(name, [a for a in assignments if a.startswith("grow.start")]).grow is None:
        known = ", ".join(known for known in recipe_names() if known.startswith("grow-"))
        raise RecipeError(
            f"recipe {name} does not grow: choose one of {known}, or set a width to start with, "
            f"as in --set grow.start=4"
        )
    return load_recipe(name, assignments)


def _tell(run: Run, *, as_json: bool) -> None:
    rounds = list(read_lines(run.growth)) if run.growth.is_file() else []
    status = run.read_status()
    if as_json:
        left_out = ("units", "training_macs")
        told = [{k: v for k, v in line.items() if k not in left_out} for line in rounds]
        spent = rounds[-1]["training_macs"] if rounds else None
        print_json({"run": str(run.folder), "rounds": told, "training_macs": spent, **status})
        return
    if rounds:
        from dessilbi.reporting.tables import growth_table

        console().print(growth_table(rounds))
    typer.echo(f"The run is in {run.folder}; see its path with: dessilbi path {run.folder}")
