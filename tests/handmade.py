# SPDX-License-Identifier: Apache-2.0
"""Run folders made by hand: any names, any number of points, nothing trained."""

import torch

from dessilbi.blocks.ticket import TensorSpec
from dessilbi.files.runs import Run, status_of
from dessilbi.files.storage import append_line, write_json
from dessilbi.path.history import History
from dessilbi.path.lines import Point
from dessilbi.training.recipes import load_recipe

EVIL = "<img src=x onerror=\"document.title='pwned'\">"
SCRIPT = "</script><script>document.title='pwned'</script>"
QUOTES = "\"' onmouseover='alert(1)' {{7*7}} $x$ &lt;b&gt;"
PER_EPOCH = 10


def handmade(folder, *, points=12, names=("conv1.weight", "conv2.weight"), judged=True, **recipe):
    """Make a run folder of two convolutions whose blocks enter one after the other."""
    run = Run(folder)
    run.folder.mkdir(parents=True)
    told = load_recipe("digits-lenet").model_dump(mode="json")
    write_json(run.recipe, {**told, **recipe})
    write_json(run.environment, {"python": "3", "data": "/home/somebody/data"})
    write_json(run.status, status_of("finished", steps=PER_EPOCH * points))
    specs = {name: TensorSpec((6, 1, 5, 5), (1, None, None, None)) for name in names}
    history = History(specs, {}, run.path)
    drawn = torch.Generator().manual_seed(0)
    for k in range(1, points + 1):
        alive = torch.arange(6).reshape(6, 1, 1, 1) < 6 * k / points
        density = float(alive.float().mean())
        history.add(Point(k * PER_EPOCH, float(k), density), dict.fromkeys(names, alive))
        history.log({"epoch": float(k), **(accuracies(k / points) if judged else {})})
        history.weigh({name: torch.rand(6, 1, 1, 1, generator=drawn) for name in names})
        line = {"epoch": k, "step": k * PER_EPOCH, "time": float(k), "loss": 1.0, "lr": 0.1}
        append_line(
            run.metrics, {**line, "val_accuracy": 0.5 + k / points / 3, "coupling": 2.0 / k}
        )
    return run


def accuracies(share):
    """What is judged at a point."""
    told = {"accuracy": 0.8 + share / 10, "ticket_accuracy": 0.1 + share * 0.75}
    return told | {"gamma_accuracy": 0.1 + share * 0.7, "val_accuracy": 0.8}
