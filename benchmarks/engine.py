# SPDX-License-Identifier: Apache-2.0
"""Measure what the engine costs, and write docs/results/measured/engine.json.

python benchmarks/engine.py choice           # Fabric and Accelerate beside a bare loop (ADR 4)
python benchmarks/engine.py loop --data DIR  # our loop beside a bare loop, and what is not steps

Steps are interleaved in one process, so that a busy machine slows all alike; what is told are
ratios of medians. `choice` needs accelerate, which the project itself does not.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dessilbi.files.storage import read_json, write_json
from dessilbi.optimizers.optimizer import DessiLBI
from dessilbi.training.engine import engine_for
from dessilbi.training.environment import environment, flushed_denormals
from dessilbi.training.ingredients import groups_of, model_of
from dessilbi.training.judging import Judge
from dessilbi.training.loop import step as engine_step
from dessilbi.training.opening import new_run
from dessilbi.training.progress import Silent
from dessilbi.training.recipes import load_recipe
from dessilbi.training.schedules import optimizer_of
from dessilbi.training.session import Session
from dessilbi.training.setting import build_optimizer, prepare
from dessilbi.training.stopping import Stop
from dessilbi.training.watching import Watching

FILE = Path(__file__).parents[1] / "docs" / "results" / "measured" / "engine.json"
# No points and no checkpoints among the steps: what they cost is measured by itself.
BARE = ("points=1", "judged=1", "checkpoint_every=1e6", "epochs=1000")


def interleaved(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each step; the order turns every round, and the first tenth is left out."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(told[rounds // 10 :]) for name, told in times.items()}


def bare_step(model: nn.Module, optimizer: DessiLBI, feed: Callable) -> Callable[[], float]:
    def step() -> float:
        inputs, targets = feed()
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


# loop: ours beside a bare one


def loop(name: str, rounds: int, data: str | None) -> dict:
    whole = load_recipe(name)
    recipe = load_recipe(name, BARE)
    with ExitStack() as stack:
        engine = stack.enter_context(engine_for(recipe.precision, device="cpu"))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(flushed_denormals())
        setting = prepare(recipe, engine, data_root=data)
        run = new_run(setting, engine, folder / "run", data)
        session = Session(setting, engine, Watching(run, Silent(), (), first=True), None)
        setting.module.train()
        stop, (inputs, targets) = Stop(), next(session.batches())
        model = model_of(recipe, setting.data)
        optimizer = build_optimizer(
            groups_of(recipe, model, setting.data), optimizer_of(recipe, setting.total_steps)
        )
        model.train()

        def ours() -> None:
            setting.set_lr(session.position.step)
            engine_step(session, inputs, targets)
            session.after_step(stop)

        feed = itertools.chain.from_iterable(session.batches() for _ in itertools.count())
        bare = bare_step(model, optimizer, lambda: (inputs, targets))
        steps = {"bare": bare, "engine": ours, "data": lambda: next(feed)}
        seconds = interleaved(steps, rounds)
        # At a step of its own, so that nothing is known from before.
        seconds["point"] = timed(lambda: session.judge.at_point(-1))
        seconds["validation"] = timed(lambda: session.judge.validation(-2))
        seconds["saving"] = statistics.median(timed(partial(save, session)) for _ in range(5))
        judge = Judge(replace(setting, recipe=whole), engine)
        spent = of_the_whole_recipe(judge, seconds)
    total = sum(spent.values())
    return {
        "recipe": name,
        "model": recipe.model,
        "data": recipe.data,
        "batch_size": recipe.batch_size,
        "rounds": rounds,
        "seconds": seconds,
        "engine_over_bare": seconds["engine"] / seconds["bare"],
        "data_over_step": seconds["data"] / (seconds["data"] + seconds["engine"]),
        "epochs": whole.epochs,
        "points_judged": sum(judge.wants(s + 1) for s in range(judge.setting.total_steps)),
        "shares_of_the_whole_recipe": {key: value / total for key, value in spent.items()},
    }


def of_the_whole_recipe(judge: Judge, seconds: dict[str, float]) -> dict[str, float]:
    """Seconds of all steps, of their data, of judging and of saving in the recipe as it stands."""
    setting, recipe = judge.setting, judge.setting.recipe
    steps = setting.total_steps
    judged = sum(judge.wants(step + 1) for step in range(steps))
    saved = recipe.epochs / max(recipe.checkpoint_every, 1 / setting.steps_per_epoch)
    return {
        "steps": steps * seconds["engine"],
        "data": steps * seconds["data"],
        "judging": judged * seconds["point"] + recipe.epochs * seconds["validation"],
        "saving": saved * seconds["saving"],
    }


def save(session: Session) -> None:
    session.position.step += 1  # a checkpoint that is there already is not written again
    session.save()


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# choice: Fabric or Accelerate


def choice(rounds: int) -> dict:
    from accelerate import Accelerator
    from lightning_fabric import Fabric

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(128, 1, 28, 28, generator=generator)
    targets = torch.randint(10, (128,), generator=generator)
    recipe = load_recipe("mnist-lenet", BARE)

    def made() -> tuple[nn.Module, DessiLBI]:
        from dessilbi.groups import param_groups
        from dessilbi.models import build_model

        model = build_model("lenet", num_classes=10, in_channels=1, seed=0)
        groups = param_groups(model, recipe.structure)
        return model, build_optimizer(groups, optimizer_of(recipe, 1000))

    def wrapped(kind: str) -> Callable[[], float]:
        model, optimizer = made()
        if kind == "bare":
            return bare_step(model, optimizer, lambda: (inputs, targets))
        if kind == "fabric":
            library = Fabric(accelerator="cpu", devices=1)
            model, optimizer = library.setup(model, optimizer)
        else:
            library = Accelerator(cpu=True)
            model, optimizer = library.prepare(model, optimizer)

        def step() -> float:
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs), targets)
            library.backward(loss)
            optimizer.step()
            return loss.item()

        return step

    with flushed_denormals():
        medians = interleaved({k: wrapped(k) for k in ("bare", "fabric", "accelerate")}, rounds)
    return {
        "model": "lenet",
        "batch_size": 128,
        "rounds": rounds,
        "milliseconds": {key: 1000 * value for key, value in medians.items()},
        "over_bare": {key: medians[key] / medians["bare"] for key in ("fabric", "accelerate")},
        "packages": {key: weight(name) for key, name in PACKAGES.items()},
        "fsdp2_on_two_gloo_ranks": {key: sharded_by(key) for key in PACKAGES},
    }


PACKAGES = {"fabric": "lightning-fabric", "accelerate": "accelerate"}
OURS = ("numpy", "pydantic", "rich", "safetensors", "scikit-learn", "torch", "typer")


def weight(name: str) -> dict:
    """Packages and megabytes that come on top of what the project needs anyway."""
    before = {key for own in OURS for key in needed(own)}
    new = {key: found for key, found in needed(name).items() if key not in before}
    files = [f.locate() for found in new.values() for f in found.files or ()]
    size = sum(f.stat().st_size for f in files if f.exists())
    return {"version": metadata.version(name), "packages": sorted(new), "mib": size / 2**20}


def needed(name: str, extras: tuple[str, ...] = ()) -> dict[str, metadata.Distribution]:
    from packaging.requirements import Requirement

    found: dict[str, metadata.Distribution] = {}
    waiting = [(name, extras)]
    while waiting:
        name, extras = waiting.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if key in found and not extras:
            continue
        found[key] = distribution
        for text in distribution.requires or ():
            told = Requirement(text)
            asked = [{"extra": extra} for extra in ("", *extras)]
            if told.marker is None or any(told.marker.evaluate(a) for a in asked):
                waiting.append((told.name, tuple(told.extras)))
    return found


SHARDED = """
import sys
from torch import nn, optim
model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
if sys.argv[1] == "fabric":
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard
    shard = lambda m, mesh: fully_shard(m, mesh=mesh["data_parallel"])
    strategy = ModelParallelStrategy(shard, data_parallel_size=2, tensor_parallel_size=1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model = fabric.setup_module(model)
else:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model, _ = accelerator.prepare(model, optim.SGD(model.parameters(), lr=0.1))
print("KIND", type(next(model.parameters())).__name__)
"""


def sharded_by(kind: str) -> bool:
    """Whether a model asked to be sharded on two gloo ranks is."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sharded.py"
        file.write_text(SHARDED)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
                *("--master-port", "29653", str(file), kind),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    return done.stdout.count("KIND DTensor") == 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("choice", "loop"))
    parser.add_argument("--data", default=os.environ.get("DESSILBI_DATA"))
    arguments = parser.parse_args()
    FILE.parent.mkdir(parents=True, exist_ok=True)
    if arguments.part == "choice":
        found: object = choice(rounds=400)
    else:
        rounds = {"digits-lenet": 800, "mnist-lenet": 400, "cifar10-resnet20": 60}
        found = [loop(name, count, arguments.data) for name, count in rounds.items()]
    told = environment()
    machine = {key: told[key] for key in ("python", "machine", "cpus", "threads", "packages")}
    before = read_json(FILE) if FILE.is_file() else {}
    command = f"python benchmarks/engine.py {arguments.part}"
    part = {"command": command, "environment": machine, "measured": found}
    write_json(FILE, {**before, arguments.part: part})
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
