# SPDX-License-Identifier: Apache-2.0
"""Iterating: a ticket of one run seeds the next, on a model that is physically smaller."""

from pathlib import Path as FilePath

from dessilbi.blocks.ticket import Ticket
from dessilbi.cuts.closing import close
from dessilbi.files.runs import Run
from dessilbi.training.finetune import load_trained
from dessilbi.training.recipes import Recipe, RecipeError
from dessilbi.training.starting import Start, check_not_grown
from dessilbi.training.thinning import cut_out, met


def next_round(
    parent: str | FilePath, ticket: str | FilePath, recipe: Recipe, *, data_root: str | None = None
) -> tuple[Recipe, Start]:
    """Return what to train and what to begin with: the trained weights on a ticket, compacted.

    What is dead inside the smaller model stays dead in the next run as well.

    Args:
        parent: Folder of a finished run.
        ticket: File of a ticket of it.
        recipe: Of the next run; its model and data are those of the parent.
        data_root: Folder of the data sets.

    Raises:
        FileNotFoundError: A file is missing, or the run did not finish.
        ValueError: The ticket is of another model, or the model cannot be compacted for training.
    """
    run = Run(FilePath(parent))
    trained = load_trained(run, data_root=data_root)
    check_not_grown(trained.recipe, run)
    for name in ("model", "data"):
        if getattr(recipe, name) != getattr(trained.recipe, name):
            raise RecipeError(
                f"{name}={getattr(recipe, name)!r} is not that of {run.folder}, which has "
                f"{getattr(trained.recipe, name)!r}: the next round goes on with it"
            )
    chosen, before = Ticket.load(ticket), trained.start
    chosen.density_of_model(trained.model)  # checks names and shapes
    if before is not None and before.ticket is not None:
        chosen = met(chosen, before.ticket)
    closed = close(chosen, trained.model, example_inputs=trained.data.train.examples(1)[0])
    told = {
        "mode": "next round",
        "parent": str(run.folder.absolute()),
        "round": 2 if before is None else int(before.told.get("round", 1)) + 1,
        "recipe": trained.recipe.name,
        "density": closed.density,
        "density_of_model": closed.density_of_model(trained.model),
    }
    start = Start(
        dict(trained.model.state_dict()),
        closed,
        before.blueprint if before is not None else None,
        trained=True,
        told=told,
    )
    return recipe, cut_out(start, trained.model, trained.data)
