# SPDX-License-Identifier: Apache-2.0
"""The demo: train once, see the path, hold a family of models, ship a smaller one."""

from dataclasses import asdict, replace
from pathlib import Path as FilePath
from typing import Annotated

import typer

from dessilbi.cli.terminal import console, guarded
from dessilbi.files.runs import free_path
from dessilbi.files.sealing import sealed
from dessilbi.files.storage import write_json
from dessilbi.training.recipes import load_recipe

DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05)
SMALL = 0.25  # the density of the ticket that becomes a smaller model


@guarded
def demo(
    out: Annotated[FilePath | None, typer.Option(help="The run folder to make.")] = None,
) -> None:
    """Train on digits: a path of tickets with LeNet, a smaller model with a residual net."""
    folder = out or free_path("runs", "demo")
    _family(folder)
    other = free_path(folder.parent, f"{folder.name}-resnet")
    _smaller(other)
    typer.echo("See both runs in a browser, model by model along their paths:")
    typer.echo(f"  dessilbi report {folder} {other}")


def _family(folder: FilePath) -> None:
    """One run of LeNet, its path, and what its tickets are worth."""
    from dessilbi.path.path import Path
    from dessilbi.reporting.summary import summarise
    from dessilbi.reporting.tables import outcome_table, path_table
    from dessilbi.training.finetune import judge_tickets, load_trained
    from dessilbi.training.loop import train as train_recipe
    from dessilbi.training.progress import default_reporter

    recipe = load_recipe("digits-lenet")
    run = train_recipe(recipe, folder, reporter=default_reporter())
    screen = console()
    screen.print(path_table(summarise(run.folder)))
    trained = load_trained(run)
    outcomes = judge_tickets(trained, Path.load(run.folder), DENSITIES)
    told = {"accuracy": trained.accuracy, "tickets": [asdict(o) for o in outcomes]}
    write_json(run.family, sealed(told))
    screen.print(outcome_table(outcomes, trained.accuracy, recipe.finetune.epochs))
    typer.echo(f"The run folder is {run.folder}; take a ticket with:")
    typer.echo(f"  dessilbi ticket {run.folder} --density 0.1\n")


def _smaller(folder: FilePath) -> None:
    """One run of a residual net, and a ticket of it as a smaller model in a file."""
    from dessilbi.cuts.closing import close
    from dessilbi.outcomes.compacting import example_of, save_shrunk, shipped, shrink
    from dessilbi.path.path import Path
    from dessilbi.reporting.tables import size_table
    from dessilbi.training.finetune import finetune, load_trained
    from dessilbi.training.loop import train as train_recipe
    from dessilbi.training.progress import default_reporter

    recipe = load_recipe("digits-resnet")
    run = train_recipe(recipe, folder, reporter=default_reporter())
    trained = load_trained(run)
    example = example_of(trained)
    chosen = Path.load(run.folder).ticket(density=SMALL)
    # Closed first: what the fine-tune learns must not live in biases of dead filters.
    ticket = close(chosen, trained.model, example_inputs=example)
    tuned = replace(trained, model=finetune(trained, ticket, recipe.finetune))
    shrunk = shrink(tuned, ticket)
    place = save_shrunk(shrunk, run.compacted / f"density-{SMALL:g}", run, trained, fine_tuned=True)
    try:
        files = shipped(shrunk, place / "model.onnx", example)
    except ImportError as error:
        files = None
        typer.echo(f"Skipped the ONNX files: {error}")
    console().print(size_table(shrunk, files, trained.accuracy))
    typer.echo(f"The smaller model is in {place}; check it with:")
    typer.echo(f"  dessilbi verify {place}")
