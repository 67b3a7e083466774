# SPDX-License-Identifier: Apache-2.0
"""Early tickets of LeNet, beside their controls: the runs of tickets-protocol.md.

    python benchmarks/tickets.py --data DIR [--work DIR] [--seeds 0 1 2]

One JSON line for each cell in docs/results/tickets.jsonl; cells that are there already are skipped,
and runs that were cut short go on, so it may be stopped at any time.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path as FilePath
from typing import Any

import safetensors.torch
import torch

from dessilbi.blocks.ticket import Ticket
from dessilbi.choosing.choosing import Family
from dessilbi.files.runs import Run
from dessilbi.files.storage import append_line, read_lines
from dessilbi.outcomes.tickets import Drawer
from dessilbi.path.path import Path
from dessilbi.path.settling import settled
from dessilbi.training import loop, retraining
from dessilbi.training.checkpoints import Checkpoints
from dessilbi.training.data import DATA_SETS
from dessilbi.training.engine import engine_for
from dessilbi.training.evaluation import accuracy, masked
from dessilbi.training.finetune import Trained, load_trained
from dessilbi.training.recipes import Recipe, load_recipe

RESULTS = FilePath(__file__).parents[1] / "docs" / "results" / "tickets.jsonl"
DENSITIES, CONTROLLED, LADDER = (0.2, 0.1, 0.05), (0.1, 0.05), (0.45, 0.2, 0.1, 0.05)
MOMENTS = {10: 94, 25: 235, 50: 470}  # percent of the search -> step of its checkpoint
IMAGES, STEPS_BETWEEN = 25_000, 47
SETTING = (
    *("epochs=6", "batch_size=128", "validation=5000", "points=50", "judged=1"),
    *("optimizer.R=10", "optimizer.lam=0.4", "checkpoint_every=0.3", "keep_checkpoints=100"),
    "stop.window=1000000",  # judges the ticket at every point and never stops
)


def small(name: str) -> str:
    """Register the first images of a set under a name of its own."""
    source, key = DATA_SETS[name], f"{name}-25k"

    def read(root: Any, download: bool) -> Any:
        (images, labels), test = source.read(root, download)
        return (images[:IMAGES], labels[:IMAGES]), test

    DATA_SETS[key] = replace(source, read=read)
    return key


def recipe_for(data: str, seed: int, more: tuple[str, ...] = ()) -> Recipe:
    wanted = (*SETTING, f"data={data}", f"seed={seed}", f"name=early-tickets-{data}-{seed}")
    return load_recipe("mnist-lenet-best", (*wanted, *more))


class Bench:
    """Runs cells, skips those that are there, and keeps what they came to."""

    def __init__(self, work: FilePath, results: FilePath, root: str, more: tuple[str, ...]):
        self.work, self.results, self.root, self.more = work, results, root, more
        self.done = {line["cell"] for line in read_lines(results)} if results.exists() else set()

    def tell(self, cell: str, **facts: Any) -> None:
        """Write the line of a cell, once."""
        if cell not in self.done:
            self.results.parent.mkdir(parents=True, exist_ok=True)
            append_line(self.results, {"cell": cell, **facts})
            self.done.add(cell)
        print(cell, {k: v for k, v in facts.items() if not isinstance(v, list | dict)}, flush=True)

    def trained(self, recipe: Recipe, folder: FilePath, start: Any = None) -> Run:
        """Train a run, go on with it, or take it as it is."""
        run = Run(folder)
        if run.recipe.is_file():
            return loop.resume(folder, data_root=self.root)
        return loop.train(recipe, folder, data_root=self.root, device="cpu", start=start)

    def retrained(self, search: Run, trained: Trained, ticket: Ticket, mode: Any, name: str) -> Run:
        """Retrain a ticket as the search was trained."""
        wish = retraining.Wish(mode=mode)
        recipe, start = retraining.retraining(search, trained, ticket, wish, trained.data)
        return self.trained(recipe, self.work / name, start)


def outcome(run: Run, **facts: Any) -> dict[str, Any]:
    status = run.read_status()
    names = ("accuracy", "val_accuracy", "steps", "density")
    return {**facts, **{name: status[name] for name in names if name in status}}


def after_extraction(search: Run, drawer: Drawer) -> Iterator[dict[str, Any]]:
    """Test accuracy of W on its ticket along the path, nothing retrained."""
    data, last = drawer.data, drawer.path.step
    for step in (*range(2 * STEPS_BETWEEN, last, 2 * STEPS_BETWEEN), last):
        if step == last:
            weights = safetensors.torch.load_file(search.model)
        else:
            with engine_for(device="cpu") as engine:
                kept = Checkpoints(search.checkpoints, engine, keep=1).at(step)
            tensors = kept.tensors(lambda listed: {})
            weights = {
                name.removeprefix("model/"): value
                for name, value in tensors.items()
                if name.startswith("model/")
            }
        family = drawer.family(step=step)
        drawer.model.load_state_dict(weights)
        found = {"step": step, "dense": accuracy(drawer.model, data.test)}
        for density in DENSITIES:
            ticket = family.choose("density", density).ticket
            found[str(density)] = accuracy(masked(drawer.model, ticket, data.train), data.test)
        yield found


def search_cell(bench: Bench, data: str, seed: int) -> tuple[Run, Trained]:
    recipe = recipe_for(data, seed, bench.more)
    search = bench.trained(recipe, bench.work / f"{data}-{seed}-search")
    cell = f"{data} {seed} search"
    if cell not in bench.done:
        path = Path.load(search.folder)
        found, steps = settled(path), path.step / recipe.epochs
        supports = [{"step": p.step, "density": p.density, **p.metrics} for p in path.points]
        bench.tell(
            cell,
            **outcome(search, data=data, seed=seed, kind="search"),
            settled=asdict(found) if found else None,
            epochs_saved=recipe.epochs - found.step / steps if found else 0.0,
            extraction=list(after_extraction(search, Drawer(search, data_root=bench.root))),
            points=supports,
        )
    return search, load_trained(search, data_root=bench.root)


def tickets_at(search: Run, root: str) -> dict[tuple[int, float], Ticket]:
    drawer = Drawer(search, data_root=root)
    found = {}
    for share, step in MOMENTS.items():
        family = drawer.family(step=step)
        for density in DENSITIES:
            found[share, density] = family.choose("density", density).ticket
    return found


def imp_cells(
    bench: Bench, search: Run, trained: Trained, dense: Run, data: str, seed: int
) -> None:
    """Iterative magnitude pruning: every rung is retrained from the initialisation."""
    example, path = trained.data.train.examples(1)[0], Path.load(search.folder)
    before = dense
    for density in LADDER:
        weights = safetensors.torch.load_file(before.model)
        key = {name: weights[name].abs() for name in path.specs}
        family = Family([key], path.specs, path.units, model=trained.model, example_inputs=example)
        ticket = family.choose("density", density).ticket
        name = f"{data}-{seed}-imp-{density}"
        before = bench.retrained(search, trained, ticket, "rewind", name)
        facts = outcome(before, data=data, seed=seed, kind="imp", wanted=density)
        bench.tell(f"{data} {seed} imp {density}", **facts)


def cells(bench: Bench, name: str, seed: int) -> None:
    """All cells of one set and one seed."""
    data = small(name)
    search, trained = search_cell(bench, data, seed)
    found = tickets_at(search, bench.root)
    dense = bench.retrained(search, trained, found[25, 0.1], "dense", f"{data}-{seed}-dense")
    facts = outcome(dense, data=data, seed=seed, kind="dense", wanted=1.0)
    bench.tell(f"{data} {seed} dense", **facts)
    wanted = [(25, d, mode) for d in CONTROLLED for mode in ("rewind", "reinit", "random")]
    wanted += [(share, d, "rewind") for share in MOMENTS for d in DENSITIES]
    for share, density, mode in dict.fromkeys(wanted):
        cell = f"{data} {seed} {mode} {share} {density}"
        if cell in bench.done:
            continue
        ticket = found[share, density]
        run = bench.retrained(search, trained, ticket, mode, cell.replace(" ", "-"))
        told = {"data": data, "seed": seed, "kind": mode, "share": share, "wanted": density}
        bench.tell(cell, **outcome(run, **told))
    imp_cells(bench, search, trained, dense, data, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder of the data sets")
    parser.add_argument("--work", type=FilePath, default=FilePath("runs/tickets"))
    parser.add_argument("--results", type=FilePath, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sets", nargs="+", default=["mnist", "fashion-mnist"])
    parser.add_argument("--set", dest="more", action="append", default=[], help="for a trial")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(asked.work, asked.results, asked.data, tuple(asked.more))
    for seed in asked.seeds:
        for name in asked.sets:
            cells(bench, name, seed)


if __name__ == "__main__":
    main()
