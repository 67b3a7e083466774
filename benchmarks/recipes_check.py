# SPDX-License-Identifier: Apache-2.0
"""Check that recipes select something: train them, or a short form, and look at the support.

python benchmarks/recipes_check.py                            # only write docs/recipes.md again
python benchmarks/recipes_check.py cifar10-resnet20 --data DIR

What is trained is in CHECKS: full recipes, or the same settings with fewer epochs or a smaller net.
"""

import argparse
import math
import os
import re
import time
from dataclasses import asdict
from pathlib import Path as FilePath

import torch
from torch import nn

from dessilbi.blocks.structure import block_norms
from dessilbi.files.runs import free_path
from dessilbi.files.storage import read_json, write_json
from dessilbi.models import build_model
from dessilbi.optimizers import dual
from dessilbi.path.path import Path
from dessilbi.reporting.summary import summarise, thinned
from dessilbi.training.evaluation import masked
from dessilbi.training.feeding import Split
from dessilbi.training.finetune import load_trained
from dessilbi.training.ingredients import data_of, groups_of
from dessilbi.training.loop import train
from dessilbi.training.objective import loss_of
from dessilbi.training.progress import default_reporter
from dessilbi.training.recipes import Recipe, load_recipe, recipe_names
from dessilbi.training.schedules import multiplier, optimizer_of
from dessilbi.training.setting import build_optimizer

ROOT = FilePath(__file__).parents[1]
FOLDER = ROOT / "docs" / "results" / "checks"
# Images, or characters divided by the length, to train and to validate with.
SAMPLES = {"digits": 1437, "mnist": 60_000, "fashion-mnist": 60_000, "cifar10": 50_000}
SAMPLES |= {"imagenet": 1_281_167, "tinyshakespeare": 15_685, "folder": 2200}
CLASSES = {"imagenet": 1000}
CHECKS: dict[str, tuple[str, ...]] = {
    "shakespeare-gpt": ("points=4",),
    "cifar10-resnet20": ("model=resnet8", "epochs=1", "points=2"),
    "cifar10-resnet18": ("model=resnet8", "epochs=1", "points=2"),
    "cifar10-resnet50-lasso": ("model=resnet8", "epochs=2", "points=2"),
    "cifar10-resnet56-bottleneck": ("model=resnet8", "epochs=2", "points=4"),
}


def check(name: str, data: str | None) -> None:
    """Train the recipe's short form and write what entered."""
    recipe = load_recipe(name, CHECKS[name])
    began, used = time.monotonic(), time.process_time()
    run = train(
        recipe,
        free_path(ROOT / "runs" / "checks", name),
        data_root=data,
        reporter=default_reporter(),
    )
    rows = summarise(run.folder).rows
    trained = load_trained(run, data_root=data)
    ticket = masked(
        trained.model, Path.load(run.folder).support(step=rows[-1].step), trained.data.train
    )
    write_json(
        FOLDER / f"{name}.json",
        {
            "command": f"python benchmarks/recipes_check.py {name}",
            "set": CHECKS[name],
            "recipe": recipe.model_dump(),
            "environment": {
                key: value
                for key, value in read_json(run.environment).items()
                if key not in ("command", "platform", "data")
            },
            "seconds": time.monotonic() - began,
            "cpu_seconds": time.process_time() - used,
            "final": asdict(rows[-1]),
            "val_loss": mean_loss(trained.model, trained.data.validation),
            "val_ticket_loss": mean_loss(ticket, trained.data.validation),
            "path": [asdict(row) for row in thinned(rows, 20)],
        },
    )
    density = rows[-1].density
    if not 0 < density < 1:
        raise SystemExit(f"{name}: the support is {'empty' if density == 0 else 'full'}")


@torch.no_grad()
def mean_loss(model: nn.Module, split: Split) -> float:
    """Mean loss over all answers of a split, in nats."""
    model.eval()
    total, answers = 0.0, 0
    for inputs, targets in split.in_order(250):
        total += loss_of(model(inputs), targets).item() * targets.numel()
        answers += targets.numel()
    return total / answers


def reckon(recipe: Recipe) -> dict[str, float | None]:
    """What the recipe's numbers alone say: R, and what enters even without any gradient.

    Without gradient W = W_0 exp(-kappa t/nu), so that V goes to W_0/kappa: a block enters if and
    only if its norm at the start exceeds kappa lam, at t = -nu/kappa log(1 - kappa lam/norm).
    """
    name = recipe.data if recipe.data in SAMPLES else "folder"
    total = recipe.epochs * ((SAMPLES[name] - recipe.validation) // recipe.batch_size)
    small = {"data": f"generated:{recipe.data}:300", "validation": 200}
    small["image_size"] = 64 if recipe.image_size else None
    blank = data_of(recipe.model_copy(update=small), root=None)
    model = build_model(
        recipe.model,
        num_classes=CLASSES.get(name, blank.num_classes),
        in_channels=blank.in_channels,
        side=blank.side,
        length=blank.length,
        seed=recipe.seed,
    )
    options = optimizer_of(recipe, total)
    nu, kappa = options.nu, options.kappa
    units = dual.units_of(dual.members(build_optimizer(groups_of(recipe, model, blank), options)))
    shares = [
        block_norms(unit[0].param.detach(), unit[0].block).flatten() / dual.threshold(unit)
        for unit in units
    ]
    entering = sum(
        unit[0].size * int((s > kappa).sum()) for unit, s in zip(units, shares, strict=True)
    )
    times = [
        options.path_lr * multiplier(recipe.schedule, step, total, recipe.epochs)
        for step in range(total)
    ]
    first, largest = None, max(s.max().item() for s in shares) / kappa
    if largest > 1:
        clock = torch.tensor(times, dtype=torch.float64).cumsum(0)
        wanted = -nu / kappa * math.log(1 - 1 / largest)
        reached = int((clock < wanted).sum())
        first = recipe.epochs * reached / total if reached < total else None
    if recipe.density is not None:  # lambda is not known ahead
        return {"R": kappa * sum(times) / nu, "without_gradient": None, "first_epoch": None}
    return {
        "R": kappa * sum(times) / nu,
        "without_gradient": entering / sum(unit[0].param.numel() for unit in units),
        "first_epoch": first,
    }


def page() -> str:
    """The page of all recipes."""
    lines = [
        "# Recipes",
        "",
        "`dessilbi recipes` lists them, `dessilbi recipes show NAME` prints one in full as a TOML",
        "file to start one's own from. Written by `python benchmarks/recipes_check.py`.",
        "",
        "R = T/nu is reckoned, and so are the last two columns: a block that gets no gradient at",
        "all decays to zero, and yet enters if its norm at the start exceeds kappa lam. Given are",
        "the density of such blocks and the epoch of the first. Training adds others, and frees",
        "from the decay what has entered. Where such blocks are many, as with the authors' numbers",
        "for ImageNet and for lasso, the support may fill up in time, and a ticket is taken from",
        "the path before that. Recipes that say a density have neither column: lambda is found.",
        "In recipes that grow (grow-*), a full layer is what asks for a wider one.",
        "",
        "| recipe | source | lr, epochs, batch | R | checked | enters anyway | from epoch |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [row(load_recipe(name)) for name in recipe_names()]
    lines += ["", "## Checks", ""]
    lines += [line for file in sorted(FOLDER.glob("*.json")) for line in told(file)]
    return "\n".join(lines).rstrip() + "\n"


def row(recipe: Recipe) -> str:
    if (ROOT / "docs" / "results" / f"{recipe.name}.json").is_file():
        checked = "[measured](results.md)"
    elif (FOLDER / f"{recipe.name}.json").is_file():
        whole = all(value.startswith("points=") for value in CHECKS[recipe.name])
        checked = "in full, below" if whole else "a short form, below"
    else:
        checked = "three steps, in the tests"
    source = re.split("[:,;]", recipe.source)[0]
    setting = f"{recipe.optimizer.lr:g}, {recipe.epochs}, {recipe.batch_size}"
    facts = reckon(recipe)
    first = "-" if facts["first_epoch"] is None else f"{facts['first_epoch']:.1f}"
    anyway = facts["without_gradient"]
    entering = "-" if anyway is None else f"{100 * anyway:.0f} %"
    return (
        f"| {recipe.name} | {source} | {setting} | {facts['R']:.0f} | {checked} | "
        f"{entering} | {first} |"
    )


def told(file: FilePath) -> list[str]:
    result = read_json(file)
    final, changed = result["final"], " ".join(f"--set {value}" for value in result["set"])
    layers = ", ".join(
        f"{layer.removesuffix('.weight')} {100 * density:.0f} %"
        for layer, density in final["layers"].items()
    )
    text = (
        f"**{file.stem}** {changed} ({result['seconds']:.0f} s, {result['cpu_seconds']:.0f} s of "
        f"CPU): test accuracy of W {100 * final['accuracy']:.1f} %, of the ticket "
        f"{100 * final['ticket_accuracy']:.1f} %, density {100 * final['density']:.1f} %; "
        f"validation loss {result['val_loss']:.3f} and {result['val_ticket_loss']:.3f} nats. "
        f"Blocks in the support: {layers}."
    )
    return [text, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", choices=[[], *CHECKS])
    parser.add_argument("--data", default=os.environ.get("DESSILBI_DATA"))
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in arguments.recipes:
        check(name, arguments.data)
    (ROOT / "docs" / "recipes.md").write_text(page())


if __name__ == "__main__":
    main()
