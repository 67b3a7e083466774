# SPDX-License-Identifier: Apache-2.0
"""Measure the page of a long path: time and size for 200 epochs of a ResNet-56.

python benchmarks/report.py                # writes docs/results/measured/report.json

The run folder is made up, because nothing here depends on what was learnt: the recipe's model, its
filters as blocks, one recorded point an epoch in which they enter one after the other, norms of
every filter, and a line of metrics for every epoch. What is measured is a process of its own:
`dessilbi report RUN`, from its start to its end; a second process says where its time goes. Where
other programs share the machine (the load is in the record), CPU time says more than the clock.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from dessilbi.blocks.structure import resolve
from dessilbi.blocks.ticket import TensorSpec
from dessilbi.files.runs import Run, status_of
from dessilbi.files.storage import append_line, read_json, write_json
from dessilbi.path.history import History
from dessilbi.path.lines import Point
from dessilbi.reporting.frames import MOST
from dessilbi.training.environment import environment
from dessilbi.training.ingredients import data_of, groups_of, model_of
from dessilbi.training.recipes import load_recipe

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "results" / "measured" / "report.json"
EPOCHS, STEPS = 200, 352
GOAL_SECONDS, GOAL_BYTES = 10, 12_000_000

PARTS = """
import json, sys, time
begun = time.process_time()
def lap(told, name):
    told[name] = round(time.process_time() - begun - sum(told.values()), 2)
told = {}
import torch
lap(told, "import torch")
from pathlib import Path
from dessilbi.reporting import frames
from dessilbi.reporting.evidence import evidence_of
from dessilbi.reporting.page import Report
lap(told, "import dessilbi")
found = evidence_of(Path(sys.argv[1]))
lap(told, "read the run folder")
opened = frames._opened(found)
lap(told, "read the model's graph (torch.export)")
frames._opened = lambda _: opened
own = frames.frames_of(found)
lap(told, "close and count the models of the slider")
Report([found], [own]).html()
lap(told, "draw figures and page")
print(json.dumps(told))
"""


@dataclass(frozen=True)
class Made:
    """A run folder that was made up, and how much is in it."""

    run: Run
    layers: int
    blocks: int
    points: int


def make(folder: Path) -> Made:
    """Make up the run folder of a ResNet-56 whose filters enter one after the other."""
    torch.manual_seed(0)
    recipe = load_recipe(
        "cifar10-resnet56",
        [f"epochs={EPOCHS}", f"points={EPOCHS}", 'structure={"*conv*.weight" = "filter"}'],
    )
    data = data_of(
        recipe.model_copy(update={"data": f"generated:{recipe.data}", "validation": 1}), root=None
    )
    model = model_of(recipe, data)
    specs = {
        name: TensorSpec(tuple(p.shape), resolve(group["structure"], p.shape))
        for group in groups_of(recipe, model, data)
        if group.get("structure") is not None
        for name, p in group["params"]
    }
    run = Run(folder)
    folder.mkdir()
    write_json(run.recipe, recipe.model_dump(mode="json"))
    write_json(run.environment, environment())
    weights = {n: t.contiguous() for n, t in model.state_dict().items()}
    for file in (run.init, run.model):
        safetensors.torch.save_file(weights, file)
    entry = {n: 0.1 + 1.2 * torch.rand(s.num_blocks).reshape(s.grid) for n, s in specs.items()}
    history = History(specs, {}, run.path)
    for epoch in range(1, EPOCHS + 1):
        share = epoch / EPOCHS
        masks = {name: moment < share for name, moment in entry.items()}
        alive = sum(int(m.sum()) * specs[n].block_size for n, m in masks.items())
        density = alive / sum(s.num_blocks * s.block_size for s in specs.values())
        history.add(Point(epoch * STEPS, 0.1 * epoch * STEPS, density), masks)
        told = {"accuracy": 0.3 + 0.6 * share, "ticket_accuracy": 0.1 + 0.8 * share**2}
        told |= {"gamma_accuracy": 0.1 + 0.7 * share**2, "val_accuracy": 0.3 + 0.6 * share}
        history.log({"epoch": float(epoch), **(told if epoch % 5 == 0 else {})})
        history.weigh(
            {name: (1 + masks[name]) * torch.rand(specs[name].grid) for name in history.norms.names}
        )
        line = {"epoch": epoch, "step": epoch * STEPS, "time": 0.1 * epoch * STEPS, "loss": 1.0}
        line |= {"val_accuracy": told["val_accuracy"], "lr": 0.1, "coupling": 5.0 / epoch}
        append_line(run.metrics, line | {"lam": 0.01 * share})
    write_json(run.status, status_of("finished", steps=EPOCHS * STEPS, accuracy=0.9))
    return Made(run, len(specs), sum(s.num_blocks for s in specs.values()), EPOCHS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="a folder to leave run and page in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = arguments.keep or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        made = make(place / "run")
        page = place / "report.html"
        command = [sys.executable, "-m", "dessilbi", "report", str(made.run.folder)]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        load = os.getloadavg()[0]
        subprocess.run([*command, "--out", str(page)], check=True)
        wall = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        parts = subprocess.run(
            [sys.executable, "-c", PARTS, str(made.run.folder)],
            check=True,
            capture_output=True,
            text=True,
        )
        told = {
            "command": "python benchmarks/report.py",
            "what": "dessilbi report RUN, a process of its own, of a made-up ResNet-56 run",
            "epochs": EPOCHS,
            "recorded_points": made.points,
            "slider_positions": min(made.points, MOST),
            "layers": made.layers,
            "filters": made.blocks,
            "run_folder_path_bytes": made.run.path.stat().st_size,
            "page_bytes": page.stat().st_size,
            "wall_seconds": round(wall, 2),
            "cpu_seconds": round(cpu, 2),
            "parts_cpu_seconds": json.loads(parts.stdout),
            "peak_megabytes": round(after.ru_maxrss / 1024),
            "goal": {"seconds": GOAL_SECONDS, "bytes": GOAL_BYTES},
            "load_before": round(load, 2),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "packages": read_json(made.run.environment)["packages"],
        }
        write_json(FILE, told)
        print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
