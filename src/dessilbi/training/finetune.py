# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning a ticket: a short masked training of the trained weights."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass

from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from dessilbi.blocks.ticket import Ticket
from dessilbi.files.runs import Run
from dessilbi.files.sealing import check_sealed
from dessilbi.files.storage import DamagedFileError, read_lines
from dessilbi.files.tensorfiles import load_tensors
from dessilbi.path.path import Path
from dessilbi.path.scores import Order
from dessilbi.training.data import Data
from dessilbi.training.environment import flushed_denormals
from dessilbi.training.evaluation import accuracy, masked
from dessilbi.training.ingredients import data_of
from dessilbi.training.objective import loss_of
from dessilbi.training.recipes import FinetuneRecipe, Recipe, validate_recipe
from dessilbi.training.schedules import multiplier
from dessilbi.training.starting import Start, built, filled, load_start


@dataclass(frozen=True)
class Outcome:
    """Accuracy of one ticket on the test split, before and after its fine-tune."""

    density: float
    density_of_model: float
    before: float
    after: float


@dataclass(frozen=True)
class Trained:
    """A finished run, loaded again: its recipe, data, dense weights and their test accuracy.

    ``start`` is what it began with, where that was not a fresh model of its recipe.
    """

    recipe: Recipe
    data: Data
    model: nn.Module
    accuracy: float
    start: Start | None = None


def load_trained(run: Run, *, data_root: str | None = None) -> Trained:
    """Load the model and the data of a finished run.

    Raises:
        FileNotFoundError: The folder is no run, the run did not finish, or the data is missing.
        ValueError: A file is damaged or fits another model.
    """
    recipe = validate_recipe(run.read_recipe(), origin=str(run.recipe))
    if not run.model.is_file():
        raise FileNotFoundError(
            f"{run.folder} has no {run.model.name}: the run did not finish; train it again"
        )
    data = data_of(recipe, root=data_root)
    start = load_start(run)
    check_sealed(run.model)
    model = filled(built(recipe, data, start, sizes_of(run)), load_tensors(run.model), run.model)
    return Trained(recipe, data, model, accuracy(model, data.test), start)


def sizes_of(run: Run) -> dict[str, int] | None:
    """Return the widths that the network of a run has grown to; None: those of its recipe.

    Raises:
        ValueError: The file that says them is damaged.
    """
    if not run.growth.is_file():
        return None
    check_sealed(run.growth)
    lines = list(read_lines(run.growth))
    units = lines[-1].get("units") if lines else None
    if not isinstance(units, dict) or not all(type(width) is int for width in units.values()):
        raise DamagedFileError(
            f"{run.growth} does not end with the widths of a network: train it again"
        )
    return units


def finetune(trained: Trained, ticket: Ticket, settings: FinetuneRecipe) -> nn.Module:
    """Return a copy of the trained model, masked and trained further under the mask.

    SGD on the living weights with the settings' schedule; dead blocks stay exactly zero. No epochs
    give what :func:`~dessilbi.training.evaluation.masked` returns.
    """
    # Not the loop of training/loop.py: that one trains into a run folder, with judged points, logs
    # and checkpoints, of which the dozens of fine-tunes of a curve keep nothing. A test holds the
    # two to the same weights; `dessilbi retrain --mode finetune` is this training as a run.
    if not settings.epochs:
        return masked(trained.model, ticket, trained.data.train)
    data, batch_size = trained.data, trained.recipe.batch_size
    model = deepcopy(trained.model)
    optimizer = SGD(
        model.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
    )
    handle = ticket.enforce(model, optimizer)
    steps = settings.epochs * data.train.steps_per_epoch(batch_size)
    scheduler = LambdaLR(
        optimizer, lambda step: multiplier(settings.schedule, step, steps, settings.epochs)
    )
    model.train()
    with flushed_denormals():
        for epoch in range(settings.epochs):
            for inputs, targets in data.train.batches(
                epoch, batch_size=batch_size, seed=trained.recipe.seed_of_order
            ):
                optimizer.zero_grad()
                loss_of(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                scheduler.step()
    handle.remove()
    return model


def judge_ticket(trained: Trained, ticket: Ticket) -> Outcome:
    """Return the test accuracy of a ticket before and after the recipe's fine-tune."""
    before = masked(trained.model, ticket, trained.data.train)
    after = finetune(trained, ticket, trained.recipe.finetune)
    return Outcome(
        density=ticket.density,
        density_of_model=ticket.density_of_model(trained.model),
        before=accuracy(before, trained.data.test),
        after=accuracy(after, trained.data.test),
    )


def judge_tickets(
    trained: Trained, path: Path, densities: Iterable[float], *, order: Order | None = None
) -> list[Outcome]:
    """Judge the tickets of several densities of one path; see :func:`judge_ticket`."""
    return [
        judge_ticket(trained, path.ticket(density=density, order=order)) for density in densities
    ]
