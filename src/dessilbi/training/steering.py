# SPDX-License-Identifier: Apache-2.0
"""Steering: what moves lambda, nu and kappa while a recipe trains, and looks out for trouble."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dessilbi.dynamics.calibration import DensityControl
from dessilbi.dynamics.clock import WEAK_COUPLING, PathClock, coupling_of, warn_about_coupling
from dessilbi.dynamics.forecast import forecast, warn_if_frozen
from dessilbi.dynamics.monitors import (
    coupling_gap,
    dead_units,
    joint_histogram,
    warn_about_dead_units,
)
from dessilbi.dynamics.scheduling import Schedules, piecewise
from dessilbi.files.storage import from_number
from dessilbi.training.data import Data
from dessilbi.training.engine import Engine
from dessilbi.training.objective import loss_of
from dessilbi.training.recipes import Recipe
from dessilbi.training.schedules import multiplier

WARM = 0.1  # the run is looked at when this share of its steps and of its path time is over
SAMPLES = 256
STUCK, ALIKE = 1 / 3, 0.99  # a loss that is still alike after this share of the epochs is stuck
FEW = 30  # steps; so short a run need not learn anything


class Steering:
    """The observers that a recipe asks for; to be made before the path.

    Args:
        recipe: What asks for them.
        optimizer: What they observe.
        total_steps: Of the whole run.

    Raises:
        ValueError: The density does not fit the tensors, or nothing can enter.
    """

    def __init__(self, recipe: Recipe, optimizer: Optimizer, total_steps: int):
        self.recipe, self.optimizer = recipe, optimizer
        self.clock = clock_of(recipe, total_steps)
        self.schedules: Schedules | None = None
        self.control: DensityControl | None = None
        moving = {name: points for name, points in recipe.moving.model_dump().items() if points}
        if moving:
            functions = {name: piecewise(points) for name, points in moving.items()}
            self.schedules = Schedules(optimizer, total_time=self.clock.total, **functions)
        if recipe.density is not None:
            self.control = DensityControl(
                optimizer,
                density=recipe.density,
                total_time=self.clock.total,
                mode=recipe.calibrate,
                freeze=recipe.freeze,
                floor=None if recipe.floor == "none" else recipe.floor,
            )
        elif recipe.optimizer.R is not None:  # the control has warned already
            warn_about_coupling(optimizer, self.clock.total, largest_alpha=self.clock.largest)
        # Before a step has let the schedules move nu.
        self.coupling = coupling_of(optimizer, self.clock.total)
        self._looked = False
        self._found: dict[str, Any] = {}
        self._first_loss: float | None = None  # None again once it was warned about

    def describe(self) -> str:
        """Return what a person should know of the clock."""
        told = f"R = kappa T/nu = {self.coupling:.3g} (T = {self.clock.total:.4g})"
        if self.coupling < WEAK_COUPLING:
            told += f"; under {WEAK_COUPLING:g} little is pulled to the support"
        return told

    def look(self, step: int, model: nn.Module, data: Data, engine: Engine) -> None:
        """After every step: once, early, look for what will waste the run.

        Every process must call it at the same steps.
        """
        early = step < WARM * self.clock.num_steps
        if self._looked or early or self.clock.time_at(step) < WARM * self.clock.total:
            return
        self._looked = True
        if self.control is None:
            warn_if_frozen(self.optimizer, self.clock, step=step)
            seen = forecast(self.optimizer, self.clock, step=step)
            self._found["can_enter"] = seen.blocks
        # The gradients of sharded weights cannot be had apart from a step.
        if engine.first and not engine.sharded:
            batch = data.train.examples(SAMPLES, device=engine.device)
            # Dropout draws numbers; the run is to see the same ones as without this look.
            with torch.random.fork_rng():
                shares = dead_units(model, lambda b: loss_of(model(b[0]), b[1]), [batch])
            warn_about_dead_units(shares)
            self._found["dead_units"] = shares

    def hear(self, epoch: int, loss: float, *, first: bool) -> None:
        """After an epoch: say so once if nothing has been learnt after a third of the run.

        Args:
            epoch: Epochs done.
            loss: Mean loss of the latest.
            first: Whether this process speaks.
        """
        if epoch == 1:
            self._first_loss = loss
        elif epoch >= max(3, STUCK * self.recipe.epochs) and self._first_loss is not None:
            long = self.clock.num_steps >= FEW
            if long and first and loss > ALIKE * self._first_loss:
                warnings.warn(
                    f"the loss has not fallen: {self._first_loss:.4g} in the first epoch, "
                    f"{loss:.4g} in epoch {epoch}; the coupling may pull the weights to zero "
                    f"before they learn: ramp it up (optimizer.nu=auto does), or lower R or lr",
                    stacklevel=2,
                )
            self._first_loss = None

    def follow(self, optimizer: Optimizer) -> None:
        """Go on with the optimizer of a network of another size."""
        self.optimizer = optimizer

    def metrics(self) -> dict[str, Any]:
        """Return what is worth a place in the line of an epoch; every process must call it."""
        found, self._found = self._found, {}
        lam = {} if self.control is None else {"lam": self.control.lam}
        gap, norms = coupling_gap(self.optimizer), joint_histogram(self.optimizer)
        return {"coupling": gap, "norms": norms} | lam | found

    def finish(self) -> None:
        """The last step is taken."""
        if self.control is not None:
            self.control.finish()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken."""
        self._looked, self._found = bool(state["looked"]), dict(state["found"])
        self._first_loss = None if state["loss"] is None else from_number(state["loss"])
        for observer, told in ((self.schedules, "schedules"), (self.control, "control")):
            if observer is not None:
                observer.load_state_dict(state[told])

    def state_dict(self) -> dict[str, Any]:
        """Return what later steps depend on, as plain JSON values."""
        return {
            "looked": self._looked,
            "found": self._found,
            "loss": self._first_loss,
            "schedules": self.schedules.state_dict() if self.schedules else None,
            "control": self.control.state_dict() if self.control else None,
        }


def clock_of(recipe: Recipe, total_steps: int) -> PathClock:
    """Return the path time of a recipe's schedule, step by step."""
    lr, epochs = recipe.optimizer.path_lr, recipe.epochs
    final = total_steps * epochs // recipe.longest  # the others are of a network that grows
    steps = [lr * multiplier(recipe.schedule, step, final, epochs) for step in range(final)]
    return PathClock([lr] * (total_steps - final) + steps)
