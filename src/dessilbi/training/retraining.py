# SPDX-License-Identifier: Apache-2.0
"""Retraining: a ticket of a run is trained again, from which weights is the question.

A retraining is a run like any other: the same loop trains a recipe in which nothing has a
structure (which makes DessiLBI plain SGD), while the ticket is enforced or cut away.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor, nn

from dessilbi.blocks.ticket import Ticket
from dessilbi.choosing.controls import random_like
from dessilbi.cuts.closing import close
from dessilbi.files.runs import Run
from dessilbi.files.sealing import check_sealed
from dessilbi.files.tensorfiles import load_tensors
from dessilbi.path.path import Path
from dessilbi.training.data import Data
from dessilbi.training.finetune import Trained
from dessilbi.training.ingredients import data_of, model_of
from dessilbi.training.recipes import MaskedTraining, Recipe, validate_recipe
from dessilbi.training.starting import Start, built, check_not_grown, filled
from dessilbi.training.thinning import cut_out, met, rescaled, warn_if_thin, without

Mode = Literal["finetune", "rewind", "early-rewind", "reinit", "random", "dense"]
MODES: tuple[Mode, ...] = get_args(Mode)
STEERED = ("density", "calibrate", "freeze", "floor")  # what finds lambda in a search
_FRESH = 1_000_003  # seeds of fresh initialisations begin here, away from those of runs


@dataclass(frozen=True)
class Wish:
    """How a ticket is to be trained again.

    Attributes:
        mode: From which weights, and with which ticket. "finetune": the trained weights. "rewind":
            the initialisation of the run. "early-rewind": its weights after ``rewind_at`` epochs.
            "reinit": a fresh initialisation. "random": the initialisation of the run, with a random
            ticket of the same density in every layer. "dense": the initialisation, nothing dead.
        number: Which repetition, from 0: another order of samples, and another fresh
            initialisation or random ticket.
        compact: Train the physically smaller model instead of the masked one.
        rescale: Divide kept weights by the root of the share of inputs that are left.
        recalibrate: Re-estimate BatchNorm statistics before judging.
        epochs: Other than the recipe says.
        data: Another data set: the head starts afresh, whole.
    """

    mode: Mode = "finetune"
    number: int = 0
    compact: bool = False
    rescale: bool = False
    recalibrate: bool = True
    epochs: int | None = None
    data: str | None = None


def retraining(
    run: Run, trained: Trained, ticket: Ticket, wish: Wish, data: Data
) -> tuple[Recipe, Start]:
    """Return what to train and what to begin with, so that the loop retrains a ticket.

    Args:
        run: The run the ticket was found in.
        trained: The same, loaded.
        ticket: A ticket of it, closed or not.
        wish: How.
        data: What :func:`data_for` returned.

    Raises:
        ValueError: The ticket is of another model, or the data does not fit it.
        RecipeError: The run grew.
        FileNotFoundError: The run has no weights to rewind to.
    """
    if wish.mode not in MODES:
        raise ValueError(f"mode={wish.mode!r} is not known: use one of {', '.join(MODES)}")
    check_not_grown(trained.recipe, run)
    recipe = recipe_of(trained.recipe, wish)
    fresh = built(recipe, data, trained.start)
    head = head_of(recipe, data) if wish.data is not None else frozenset()
    kept = without(ticket, head)
    kept.density_of_model(fresh)  # checks names and shapes
    weights = _weights(run, trained, recipe, wish, data) | {
        name: value for name, value in fresh.state_dict().items() if name in head
    }
    model = filled(fresh, weights, run.init)
    own = trained.start.ticket if trained.start is not None else None
    alive = _drawn(run, kept, own, model, data, wish, head)
    if alive is not None:
        warn_if_thin(alive)
        if wish.rescale and wish.mode != "finetune":
            model = filled(model, rescaled(model.state_dict(), alive), run.init)
    start = Start(
        dict(model.state_dict()),
        alive,
        trained.start.blueprint if trained.start is not None else None,
        trained=wish.mode == "finetune" and wish.data is None,
        recalibrate=wish.recalibrate,
        told=_told(run, trained, alive, model, wish, data),
    )
    if wish.compact:
        start = cut_out(start, model, data)
    own_params = set(dict(model.named_parameters()))
    params = sum(value.numel() for name, value in start.weights.items() if name in own_params)
    return recipe, replace(start, told={**start.told, "params": params})


def modes_of(run: Run) -> tuple[Mode, ...]:
    """Return all modes that are possible: older runs kept no early weights."""
    return tuple(mode for mode in MODES if mode != "early-rewind" or run.early.is_file())


def recipe_of(recipe: Recipe, wish: Wish) -> Recipe:
    """Return the recipe of a retraining: the parent's, without structure, on the wanted data.

    Epochs, learning rate and schedule are those of its table ``finetune`` or ``retrain``; without
    the latter a ticket is retrained as the run was trained.

    Raises:
        RecipeError: A value does not fit.
    """
    settings: MaskedTraining | None = recipe.finetune if wish.mode == "finetune" else recipe.retrain
    of_search = {"stop", "structure", "coupled", "moving", *STEERED}
    values: dict[str, Any] = recipe.model_dump(exclude=of_search)
    values["optimizer"] = recipe.optimizer.model_dump(exclude={"nu", "R", "lam", "lam_filter"})
    if settings is not None:
        own = settings.model_dump()
        values["epochs"], values["schedule"] = own.pop("epochs"), own.pop("schedule")
        values["optimizer"] = own
    values |= {
        "name": f"{recipe.name}-{wish.mode}",
        "summary": f"a ticket of {recipe.name}, {wish.mode}",
        "structure": {"*": "none"},
        "order_seed": (recipe.seed_of_order + wish.number) % 2**63,
    }
    values |= {} if wish.epochs is None else {"epochs": wish.epochs}
    values |= {} if wish.data is None else {"data": wish.data}
    return validate_recipe(values, origin=values["name"])


def data_for(trained: Trained, wish: Wish, *, root: str | None) -> Data:
    """Return the data to retrain on: the run's own, or another set.

    Raises:
        ValueError, FileNotFoundError: As :func:`data_of`.
    """
    if wish.data is None:
        return trained.data
    return data_of(recipe_of(trained.recipe, wish), root=root)


def head_of(recipe: Recipe, data: Data) -> frozenset[str]:
    """Return the names of the tensors whose shape depends on the number of classes: the head."""
    one, other = (
        {name: tuple(value.shape) for name, value in model.state_dict().items()}
        for model in (
            model_of(recipe, replace(data, num_classes=count))
            for count in (data.num_classes, data.num_classes + 1)
        )
    )
    return frozenset(name for name, shape in one.items() if other.get(name) != shape)


def _weights(
    run: Run, trained: Trained, recipe: Recipe, wish: Wish, data: Data
) -> dict[str, Tensor]:
    """The weights to begin with, without regard to the head."""
    if wish.mode == "finetune":
        return dict(trained.model.state_dict())
    if wish.mode == "reinit":
        seed = (trained.recipe.seed + _FRESH + wish.number) % 2**63
        other = recipe.model_copy(update={"seed": seed})
        return dict(built(other, data, trained.start).state_dict())
    file = run.early if wish.mode == "early-rewind" else run.init
    if not file.is_file():
        epochs, kept = run.read_status().get("epochs", trained.recipe.epochs), trained.recipe
        late = wish.mode == "early-rewind" and kept.rewind_at > epochs
        remedy = (
            f"its rewind_at={kept.rewind_at:g} lies behind its end after {epochs:g} epochs; train "
            f"the run again with a smaller one"
            if late
            else "train the run again"
        )
        raise FileNotFoundError(
            f"{run.folder} has no {file.name}, so nothing can be rewound to it: {remedy}, or "
            f"retrain with --mode finetune or --mode reinit"
        )
    check_sealed(file)
    return load_tensors(file)


def _drawn(
    run: Run,
    ticket: Ticket,
    own: Ticket | None,
    model: nn.Module,
    data: Data,
    wish: Wish,
    head: frozenset[str],
) -> Ticket | None:
    """The ticket to enforce, closed; what was dead in the run stays dead."""
    own = without(own, head) if own is not None else None
    if wish.mode == "dense":
        return own
    example = data.train.examples(1)[0]
    alive = ticket if own is None else met(ticket, own)
    if wish.mode == "random":
        path = Path.load(run.folder)
        specs = {name: spec for name, spec in path.specs.items() if name not in head}
        drawn = random_like(
            close(alive, model, example_inputs=example),
            *(specs, {name: path.units[name] for name in specs}),
            model=model,
            example_inputs=example,
            seed=wish.number,
        )
        alive = drawn if own is None else met(drawn, own)
    return close(alive, model, example_inputs=example)


def _told(
    run: Run, trained: Trained, ticket: Ticket | None, model: nn.Module, wish: Wish, data: Data
) -> dict[str, Any]:
    return {
        "mode": wish.mode,
        "number": wish.number,
        "parent": str(run.folder),
        "recipe": trained.recipe.name,
        "found_on": trained.data.name,
        "data": data.name,
        "density": 1.0 if ticket is None else ticket.density,
        "density_of_model": 1.0 if ticket is None else ticket.density_of_model(model),
        "compact": wish.compact,
        "rescale": wish.rescale,
    }
