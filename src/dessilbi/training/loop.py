# SPDX-License-Identifier: Apache-2.0
"""The loop: a recipe becomes a run folder with the weights, the path and its metrics."""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import safetensors.torch
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from dessilbi.groups import param_groups
from dessilbi.optimizer import DessiLBI
from dessilbi.path import Path
from dessilbi.runs import Run, TrainingError, create_run
from dessilbi.storage import append_line, write_atomic, write_json
from dessilbi.training.data import DATA_SETS, Data, batches, load_data
from dessilbi.training.environment import environment, flushed_denormals
from dessilbi.training.evaluation import accuracy, masked, with_weights
from dessilbi.training.models import MODELS, build_model
from dessilbi.training.progress import Reporter, Silent
from dessilbi.training.recipes import OptimizerRecipe, Recipe, RecipeError
from dessilbi.training.schedules import multiplier, path_time
from dessilbi.wrapping import Wrapped, wrap


@dataclass(frozen=True)
class Setting:
    """Everything one run needs, ready to step."""

    recipe: Recipe
    data: Data
    model: nn.Module
    optimizer: DessiLBI | Wrapped
    scheduler: LambdaLR
    total_steps: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return self.total_steps // self.recipe.epochs


def prepare(recipe: Recipe, *, data_root: str | FilePath | None, download: bool = False) -> Setting:
    """Load the data and build model, optimizer and schedule.

    Raises:
        RecipeError: The recipe names an unknown model or data set, or a rule does not fit.
        ValueError: A data file is damaged.
        FileNotFoundError: The data is not there; the message names the expected files.
    """
    for field, value, known in (
        ("model", recipe.model, MODELS),
        ("data", recipe.data, DATA_SETS),
    ):
        if value not in known:
            raise RecipeError(
                f"recipe {recipe.name}: {field}={value!r} is not known: use {', '.join(known)}"
            )
    data = load_data(
        recipe.data,
        root=data_root,
        validation=recipe.validation,
        seed=recipe.seed,
        download=download,
        normalise=recipe.normalise,
    )
    try:
        model = build_model(
            recipe.model,
            num_classes=data.num_classes,
            in_channels=data.in_channels,
            seed=recipe.seed,
        )
        groups = param_groups(model, recipe.structure)
        optimizer = build_optimizer(groups, recipe.optimizer)
    except ValueError as error:
        raise RecipeError(f"recipe {recipe.name}: {error}") from None
    steps_per_epoch = math.ceil(len(data.train.targets) / recipe.batch_size)
    total_steps = recipe.epochs * steps_per_epoch
    scheduler = LambdaLR(
        optimizer, lambda step: multiplier(recipe.schedule, step, total_steps, recipe.epochs)
    )
    return Setting(recipe, data, model, optimizer, scheduler, total_steps)


def build_optimizer(groups: list[dict[str, Any]], options: OptimizerRecipe) -> DessiLBI | Wrapped:
    """Return DessiLBI, or AdamW wrapped in its dynamics.

    Raises:
        ValueError: The options do not fit the groups.
    """
    if options.base == "sgd":
        return DessiLBI(groups, **options.model_dump(exclude={"base"}))
    base = AdamW(groups, lr=options.lr, weight_decay=options.weight_decay)
    coupling = options.model_dump(include={"nu", "lam", "kappa", "block_scale"})
    return wrap(base, **coupling)


def train(
    recipe: Recipe,
    out: str | FilePath,
    *,
    data_root: str | FilePath | None = None,
    download: bool = False,
    reporter: Reporter | None = None,
) -> Run:
    """Train a recipe and return its run folder.

    Args:
        recipe: What to train.
        out: The run folder; it must not hold files.
        data_root: Folder of the data sets in torchvision's layout.
        download: Fetch missing data.
        reporter: Hears of the progress.

    Raises:
        ValueError, FileNotFoundError: As :func:`prepare`; nothing has been written.
        FileExistsError: ``out`` holds files.
        TrainingError: The loss is not finite.
        OSError: The disk is full or not writable; what was written stays.
    """
    setting = prepare(recipe, data_root=data_root, download=download)
    run = create_run(out)
    write_json(run.recipe, recipe.model_dump())
    write_json(run.environment, environment())
    write_atomic(run.init, safetensors.torch.save(setting.model.state_dict()))
    run.set_status("running")
    try:
        with flushed_denormals():
            summary = _run(setting, run, reporter or Silent())
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        with suppress(OSError):
            run.set_status("interrupted" if interrupted else "failed", reason=str(error))
        raise
    run.set_status("finished", **summary)
    return run


def _run(setting: Setting, run: Run, reporter: Reporter) -> dict[str, float]:
    recipe, total_steps = setting.recipe, setting.total_steps
    path = Path(
        setting.optimizer,
        every=max(1, total_steps // recipe.points),
        total_time=path_time(recipe.schedule, recipe.optimizer.path_lr, total_steps, recipe.epochs),
        file=run.path,
    )
    began = time.monotonic()
    reporter.start(
        f"{recipe.name}: {recipe.epochs} epochs, {total_steps:,} steps -> {run.folder}", total_steps
    )

    def at_point(loss: float) -> None:
        facts = _judge(setting, path)
        told = {"loss": loss, "acc": facts["val_accuracy"], "density": path.points[-1].density}
        reporter.update(path.step, told)

    try:
        generator = torch.Generator().manual_seed(recipe.seed)
        for epoch in range(1, recipe.epochs + 1):
            loss, correct = _epoch(setting, path, generator, at_point)
            append_line(
                run.metrics,
                {
                    "epoch": epoch,
                    "step": path.step,
                    "time": path.time,
                    "loss": loss,
                    "train_accuracy": correct,
                    "lr": float(setting.optimizer.param_groups[0]["lr"]),
                },
            )
        if path.points[-1].step != path.step:
            path.record()
            at_point(loss)
    finally:
        reporter.finish()
    write_atomic(run.model, safetensors.torch.save(setting.model.state_dict()))
    path.save_scores(run.scores)
    last = path.points[-1].metrics
    return {
        "steps": path.step,
        "seconds": time.monotonic() - began,
        "accuracy": last["accuracy"],
        "density": path.points[-1].density,
    }


def _epoch(
    setting: Setting, path: Path, generator: torch.Generator, at_point: Callable[[float], None]
) -> tuple[float, float]:
    """One pass over the training data; returns its mean loss and accuracy."""
    model, optimizer = setting.model, setting.optimizer
    total, correct, seen = 0.0, 0, 0
    model.train()
    for inputs, targets in batches(
        setting.data.train, setting.recipe.batch_size, generator=generator
    ):
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = cross_entropy(outputs, targets)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at step {path.step + 1}: lower optimizer.lr "
                f"(now {optimizer.param_groups[0]['lr']:.3g}) or raise optimizer.nu; "
                f"the path up to step {path.step} is kept"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        setting.scheduler.step()
        total += value * len(targets)
        correct += int((outputs.argmax(dim=1) == targets).sum())
        seen += len(targets)
        if path.points and path.points[-1].step == path.step:
            at_point(value)
    return total / seen, correct / seen


def _judge(setting: Setting, path: Path) -> dict[str, float]:
    """Log the accuracies of W, of the ticket on supp(Gamma) and of Gamma at the latest point."""
    data, model, optimizer = setting.data, setting.model, setting.optimizer
    ticket = masked(model, optimizer.support(), data.train)
    shown = with_weights(model, optimizer.gamma(), data.train)
    facts = {
        "epoch": path.step / setting.steps_per_epoch,
        "accuracy": accuracy(model, data.test),
        "ticket_accuracy": accuracy(ticket, data.test),
        "gamma_accuracy": accuracy(shown, data.test),
        "val_accuracy": accuracy(model, data.validation),
        "val_ticket_accuracy": accuracy(ticket, data.validation),
    }
    path.log(**facts)
    return facts
