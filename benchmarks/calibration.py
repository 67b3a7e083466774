# SPDX-License-Identifier: Apache-2.0
"""Measure DensityControl: the density wanted, the density reached.

python benchmarks/calibration.py --minutes 5 --data DIR   # measures what is still missing
python benchmarks/calibration.py                          # only writes the tables again

One JSON line per run in docs/results/calibration.jsonl; a run that is there is not repeated.

Protocol, fixed before the first run that is reported
-----------------------------------------------------
Nets: LeNet on Fashion-MNIST (12,000 training images, pixels in [0, 1], 1,500 steps); ResNet-8 with
BatchNorm on CIFAR-10 (12,800 images, 2x2 pixels averaged to 16x16, normalised, 1,600 steps).
Both: batch 32, 4 epochs, lr 0.1, momentum 0.9, R = 10 with the coupling ramped up over 30 % of the
path time, no weight decay, no augmentation.
Structures: "element" on all weights of convolutions and linear layers; "filter" on all convolutions
and, as neurons, on all linear layers but the last, which has none. ResNet: "filter" only.
Densities 0.05, 0.1, 0.3. Learning rates: constant; step (times 0.1 at 50 and 75 % of the steps);
cosine to 0. Seeds 10, 11, 12; the rule was tuned on such runs with seeds 0, 1, 2.
Modes: "end" (track, kept to the end), "frozen" (track, frozen at 0.6 of the path time), "late".
ResNet runs "end" and "late" with seed 10 only. Floor 0.05, the default.
Reported: reached/wanted. Goals: "end" from below within one block; "frozen" within 15 % of what
was wanted, or one block where that is more; "late": the factor. No layer below its floor.
Accuracies are of 4,000 validation images: W, and W on supp(Gamma) with BatchNorm re-estimated.
"""

import argparse
import json
import math
import os
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.optim.lr_scheduler import LambdaLR

from dessilbi import DensityControl, DessiLBI, dual, param_groups
from dessilbi.clock import PathClock, alphas, set_coupling
from dessilbi.scheduling import RAMP, Schedules, piecewise
from dessilbi.storage import append_line, read_lines
from dessilbi.training.data import load_data
from dessilbi.training.evaluation import accuracy, masked
from dessilbi.training.feeding import InMemory, Split
from dessilbi.training.models import build_model

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "calibration.jsonl"
PAGE = ROOT / "docs" / "density.md"
NETS = {"lenet": ("fashion-mnist", 12_000), "resnet8": ("cifar10", 12_800)}
LAST = {"lenet": "fc2.weight", "resnet8": "fc.weight"}
MODES: dict[str, dict[str, Any]] = {
    "end": {"mode": "track"},
    "frozen": {"mode": "track", "freeze": 0.6},
    "late": {"mode": "late"},
}
SEEDS = (10, 11, 12)
EPOCHS, BATCH = 4, 32
KEYS = ("net", "structure", "density", "schedule", "seed", "mode")


def planned() -> list[dict[str, Any]]:
    """All runs, the most telling first."""
    schedules, densities = ("cosine", "step", "constant"), (0.05, 0.1, 0.3)
    kinds = (("lenet", "element"), ("lenet", "filter"), ("resnet8", "filter"))
    runs = [
        dict(zip(KEYS, (net, structure, density, schedule, seed, mode), strict=True))
        for seed, (net, structure), mode, schedule, density in product(
            SEEDS, kinds, ("frozen", "end", "late"), schedules, densities
        )
        if net == "lenet" or mode == "frozen" or seed == SEEDS[0]
    ]

    def turn(run: dict[str, Any]) -> tuple[int, int]:
        extra = run["mode"] != "frozen" and (run["net"] != "lenet" or run["seed"] != SEEDS[0])
        return int(extra), SEEDS.index(run["seed"])

    return sorted(runs, key=turn)


def factor(schedule: str, progress: float) -> float:
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "step":
        return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01
    return 1.0


_loaded: dict[str, tuple[Split, Split, int]] = {}


def parts_of(net: str, data: str | None) -> tuple[Split, Split, int]:
    """Training part, 4,000 samples to validate with, and channels, as tensors in memory."""
    if net not in _loaded:
        name, size = NETS[net]
        whole = {"fashion-mnist": 60_000, "cifar10": 50_000}[name]
        found = load_data(
            name,
            root=data,
            validation=whole - size,
            seed=0,
            normalise=net != "lenet",
            augment=False,
        )
        parts = []
        for split, count in ((found.train, size), (found.validation, 4_000)):
            inputs, targets = split.examples(count)
            if net == "resnet8":
                inputs = F.avg_pool2d(inputs, 2)
            parts.append(Split(InMemory(inputs, targets)))
        _loaded[net] = (parts[0], parts[1], found.in_channels)
    return _loaded[net]


def build(run: dict[str, Any], steps: int, channels: int) -> tuple[Any, Any, Any, PathClock]:
    net, structure = run["net"], run["structure"]
    model = build_model(net, num_classes=10, in_channels=channels, seed=run["seed"])
    rules: dict[str, Any] = {LAST[net]: None} if structure == "filter" else {}
    kinds = {n for n, p in model.named_parameters() if p.dim() > 1}
    groups = param_groups(model, rules | {n: structure for n in kinds if n not in rules})
    optimizer = DessiLBI(groups, lr=0.1, momentum=0.9)
    scheduler = LambdaLR(optimizer, lambda step: factor(run["schedule"], step / steps))
    clock = PathClock(alphas(optimizer, scheduler, steps))
    set_coupling(optimizer, 10, total_time=clock.total)
    Schedules(optimizer, total_time=clock.total, coupling=piecewise(RAMP))
    return model, optimizer, scheduler, clock


def measure(run: dict[str, Any], data: str | None) -> dict[str, Any]:
    train, validation, channels = parts_of(run["net"], data)
    steps = EPOCHS * train.steps_per_epoch(BATCH)
    model, optimizer, scheduler, clock = build(run, steps, channels)
    control = DensityControl(
        optimizer,
        density=run["density"],
        scheduler=scheduler,
        total_steps=steps,
        **MODES[run["mode"]],
    )
    began = time.process_time()
    for epoch in range(EPOCHS):
        for inputs, targets in train.batches(epoch, batch_size=BATCH, seed=run["seed"]):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            scheduler.step()
    seconds = time.process_time() - began
    support = optimizer.support()
    (target,) = control.targets
    sizes = [sum(m.size for m in unit) for unit in target.units]
    kept = [int(support[unit[0].name].sum()) for unit in named(optimizer)]
    chosen = [record for record in target.history if record.lam < math.inf]
    return run | {
        "reached": support.density,
        "largest_block": max(sizes) / target.elements,
        "below_floor": [
            unit[0].name
            for unit, count, floor in zip(named(optimizer), kept, target.floors, strict=True)
            if count < floor
        ],
        "own_lambda": sum(lam is not None for lam in target.own),
        "lambda": control.lam,
        "first_lambda_at": chosen[0].time / clock.total,
        "total_time": clock.total,
        "accuracy": accuracy(model, validation),
        "ticket_accuracy": accuracy(masked(model, support, train), validation),
        "cpu_seconds": round(seconds, 1),
        "torch": torch.__version__,
    }


def named(optimizer: Any) -> list[Any]:
    return dual.units_of(dual.named_members(optimizer))


# Tables


def met(line: dict[str, Any]) -> bool:
    """Whether a run met the goal of its mode."""
    wanted, reached, block = line["density"], line["reached"], line["largest_block"]
    if line["mode"] == "end":
        return wanted - block < reached <= wanted
    return abs(reached - wanted) <= max(0.15 * wanted, block)


def table(lines: list[dict[str, Any]]) -> str:
    rows = ["| net, structure | mode | runs | reached/wanted: worst, median, worst | goal met |"]
    rows.append("|---|---|---|---|---|")
    for net, structure in (("lenet", "element"), ("lenet", "filter"), ("resnet8", "filter")):
        for mode in MODES:
            own = [
                x for x in lines if (x["net"], x["structure"], x["mode"]) == (net, structure, mode)
            ]
            if not own:
                continue
            ratios = sorted(x["reached"] / x["density"] for x in own)
            goal = "(none)" if mode == "late" else f"{sum(map(met, own))} of {len(own)}"
            rows.append(
                f"| {net}, {structure} | {mode} | {len(own)} | "
                f"{ratios[0]:.2f}, {median(ratios):.2f}, {ratios[-1]:.2f} | {goal} |"
            )
    return "\n".join(rows)


def write_page(lines: list[dict[str, Any]]) -> None:
    """Put the table between its marks in docs/density.md."""
    text = PAGE.read_text(encoding="utf-8")
    begin, end = "<!-- measured -->\n", "<!-- end -->"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    below = sum(bool(x["below_floor"]) for x in lines)
    note = f"\n{len(lines)} runs; in {below} of them a layer ended below its floor.\n"
    PAGE.write_text(head + begin + table(lines) + "\n" + note + end + tail, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=0.0, help="start no run after so long")
    parser.add_argument("--data", default=os.environ.get("DESSILBI_DATA"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    lines = list(read_lines(RESULTS)) if RESULTS.exists() else []
    done = {tuple(line[key] for key in KEYS) for line in lines}
    began = time.monotonic()
    for run in planned():
        if tuple(run[key] for key in KEYS) in done:
            continue
        if time.monotonic() - began > 60 * arguments.minutes:
            break
        line = measure(run, arguments.data)
        append_line(RESULTS, line)
        lines.append(line)
        print(json.dumps({key: line[key] for key in (*KEYS, "reached", "cpu_seconds")}), flush=True)
    print(f"{len(lines)} of {len(planned())} runs are there")
    if lines:
        write_page(lines)


if __name__ == "__main__":
    main()
