# SPDX-License-Identifier: Apache-2.0
"""Learning rate over a run, as plain functions of the step. Path time is what they integrate to."""

import math

from dessilbi.training.recipes import OptimizerRecipe, Recipe, ScheduleRecipe


def multiplier(schedule: ScheduleRecipe, step: int, total_steps: int, epochs: int) -> float:
    """Return the factor on the base learning rate for the step with this index (from 0).

    Args:
        schedule: Which kind, and its options.
        step: Steps done before this one.
        total_steps: Steps of the whole run.
        epochs: Epochs of the whole run; milestones count in them.

    >>> hold = ScheduleRecipe(kind="hold")
    >>> [round(multiplier(hold, step, 100, 1), 2) for step in (0, 9, 50, 74, 99)]
    [0.1, 1.0, 1.0, 1.0, 0.0]
    """
    if schedule.kind == "step":
        # Whole steps are compared, so that no epoch boundary is missed by rounding.
        passed = sum(step * epochs >= m * total_steps for m in schedule.milestones)
        return schedule.gamma**passed
    if schedule.kind == "cosine":
        return _cosine(step / total_steps)
    if schedule.kind == "hold":
        warmup = schedule.warmup * total_steps
        start = schedule.hold * total_steps
        if step + 1 < warmup:
            return (step + 1) / warmup
        return 1.0 if step < start else _cosine((step - start) / (total_steps - start))
    return 1.0


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def path_time(schedule: ScheduleRecipe, lr: float, total_steps: int, epochs: int) -> float:
    """Return T, the sum of the learning rate over the whole run."""
    return lr * sum(multiplier(schedule, i, total_steps, epochs) for i in range(total_steps))


def optimizer_of(recipe: Recipe, total_steps: int) -> OptimizerRecipe:
    """Return the recipe's optimizer with ``nu`` as a number: as given, or T/R.

    Args:
        recipe: The recipe.
        total_steps: Steps of the whole run.

    >>> values = {"name": "x", "model": "lenet", "data": "digits", "epochs": 1, "batch_size": 1}
    >>> recipe = Recipe(**values, validation=1, optimizer={"lr": 0.1, "R": 10})
    >>> round(optimizer_of(recipe, total_steps=1000).nu, 6)
    10.0
    """
    options = recipe.optimizer
    if options.R is None:
        return options
    time = path_time(recipe.schedule, options.path_lr, total_steps, recipe.epochs)
    return options.model_copy(update={"nu": options.kappa * time / options.R, "R": None})
