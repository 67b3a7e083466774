# SPDX-License-Identifier: Apache-2.0
"""Setting: a recipe made real. Data, model, optimizer and learning rate, on an engine."""

from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from dessilbi.optimizers import dual
from dessilbi.optimizers.optimizer import DessiLBI
from dessilbi.optimizers.wrapping import Wrapped, wrap
from dessilbi.training.data import Data
from dessilbi.training.engine import Engine
from dessilbi.training.ingredients import data_of, groups_of, model_of
from dessilbi.training.recipes import OptimizerRecipe, Recipe, RecipeError
from dessilbi.training.schedules import multiplier, optimizer_of, path_time
from dessilbi.training.starting import Start
from dessilbi.training.steering import Steering


@dataclass(frozen=True)
class Setting:
    """Everything one run needs, ready to step.

    Attributes:
        recipe: What it was made from.
        data: Its data set.
        model: The plain model.
        module: What to call in training: the model as the engine compiled and shared it.
        optimizer: The optimizer itself.
        stepper: What to step: the optimizer as the engine adopted it.
        engine: Where it runs.
        steering: What moves lambda, nu and kappa; None where nothing has a structure.
        start: What it begins with, where that is not a fresh model; its ticket is enforced.
        final_from: Step from which the schedule of the learning rate counts; None: while the
            network grows, at a constant rate.
    """

    recipe: Recipe
    data: Data
    model: nn.Module
    module: nn.Module
    optimizer: DessiLBI | Wrapped
    stepper: Optimizer
    engine: Engine
    steering: Steering | None
    start: Start | None = None
    final_from: int | None = 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return self.data.train.steps_per_epoch(self.recipe.batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, of the longest one where the network grows."""
        return self.recipe.longest * self.steps_per_epoch

    @property
    def final_steps(self) -> int:
        """Optimizer steps over which the schedule of the learning rate goes."""
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def total_time(self) -> float:
        """Path time of the whole run."""
        recipe, steps = self.recipe, self.final_steps
        final = path_time(recipe.schedule, recipe.optimizer.path_lr, steps, recipe.epochs)
        return final + recipe.optimizer.path_lr * (self.total_steps - steps)

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the last digits of the run, as plain values."""
        return {**self.engine.facts(), "kernel": self.optimizer.kernel}

    def set_lr(self, step: int) -> None:
        """Set the learning rate of the step with this index: a function of it alone."""
        recipe = self.recipe
        if self.final_from is None:
            warmup = recipe.grow.warmup * self.steps_per_epoch if recipe.grow else 0.0
            factor = min(1.0, (step + 1) / max(1.0, warmup))
        else:
            done = step - self.final_from
            factor = multiplier(recipe.schedule, done, self.final_steps, recipe.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def prepare(
    recipe: Recipe,
    engine: Engine,
    *,
    data_root: str | FilePath | None = None,
    download: bool = False,
    start: Start | None = None,
) -> Setting:
    """Load the data and build model and optimizer.

    Raises:
        RecipeError: The recipe names an unknown model or data set, or its values do not fit them.
        ValueError: A data file is damaged.
        FileNotFoundError: The data is not there; the message names the expected files.
    """
    if download:
        engine.on_first(lambda: data_of(recipe, root=data_root, download=True) and None)
    data = data_of(recipe, root=data_root)
    if recipe.grow is not None and engine.world_size > 1:
        raise RecipeError(f"recipe {recipe.name} grows, in one process: start it without torchrun")
    if recipe.grow is not None and start is not None:
        raise RecipeError(
            f"recipe {recipe.name} grows from a fresh narrow model, not from other weights or a "
            f"ticket: leave out its table grow, or the start"
        )
    model = model_of(recipe, data) if start is None else start.build(recipe, data)
    try:
        _check_batches(recipe, data, engine)
    except ValueError as error:
        raise RecipeError(f"recipe {recipe.name}: {error}") from None
    return _made(recipe, data, model, engine, start)


def setting_with(setting: Setting, model: nn.Module, engine: Engine) -> Setting:
    """Return the same setting with another model and a new optimizer for it."""
    return _made(setting.recipe, setting.data, model, engine, setting.start)


def _made(
    recipe: Recipe, data: Data, model: nn.Module, engine: Engine, start: Start | None
) -> Setting:
    try:
        groups = groups_of(recipe, model, data)
        module = engine.place(model, compiled=recipe.compile)
        final_steps = recipe.epochs * data.train.steps_per_epoch(recipe.batch_size)
        optimizer = build_optimizer(_placed(groups, model), optimizer_of(recipe, final_steps))
        total_steps = recipe.longest * data.train.steps_per_epoch(recipe.batch_size)
        structured = bool(dual.members(optimizer))
        if recipe.grow is not None and not structured:
            raise ValueError("it grows where its support asks for it, so give it a structure")
        steering = Steering(recipe, optimizer, total_steps) if structured else None
    except ValueError as error:
        raise RecipeError(f"recipe {recipe.name}: {error}") from None
    adopted = engine.adopt(optimizer)
    if start is not None and start.ticket is not None:
        start.ticket.enforce(model, optimizer)
    final_from = None if recipe.grow is not None else 0
    return Setting(
        *(recipe, data, model, module, optimizer, adopted, engine, steering),
        start=start,
        final_from=final_from,
    )


def _check_batches(recipe: Recipe, data: Data, engine: Engine) -> None:
    data.train.batches(
        0,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        rank=engine.rank,
        world_size=engine.world_size,
    )


def _placed(groups: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """The groups with the parameters that the model has now: sharding replaces them."""
    now = dict(model.named_parameters())
    return [{**g, "params": [(name, now[name]) for name, _ in g["params"]]} for g in groups]


def build_optimizer(groups: list[dict[str, Any]], options: OptimizerRecipe) -> DessiLBI | Wrapped:
    """Return DessiLBI, or AdamW wrapped in its dynamics.

    Raises:
        ValueError: The options do not fit the groups.
    """
    optimizer: DessiLBI | Wrapped
    if options.base == "sgd":
        optimizer = DessiLBI(groups, **options.model_dump(exclude={"base", "R", "lam_filter"}))
    else:
        base = AdamW(groups, lr=options.lr, weight_decay=options.weight_decay)
        coupling = options.model_dump(include={"nu", "lam", "kappa", "block_scale"})
        optimizer = wrap(base, fused=options.fused, **coupling)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer
