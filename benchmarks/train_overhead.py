# SPDX-License-Identifier: Apache-2.0
"""What DessiLBI costs in training: epochs of ResNet-20 on images of CIFAR's shape, beside SGD.

python benchmarks/train_overhead.py --images 9600 --epochs 2 --threads 2

Contenders take turns batch by batch, each with its own copy of the net and each as often first as
last, so that whatever else the machine does falls on all of them alike. Images are noise: no figure
here is an accuracy.
"""

import argparse
import copy
import os
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from step import RESULTS, machine
from torch import Tensor, nn

from dessilbi import DessiLBI, param_groups
from dessilbi import Path as DensityPath
from dessilbi.files.storage import write_json
from dessilbi.kernels import building
from dessilbi.models import build_model

BATCH = 128
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}


def contenders(model: nn.Module) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
    """Copies of one net, each with an optimizer."""
    found = {}
    for name in ("SGD", "SGD fused", "DessiLBI fused", "DessiLBI reference"):
        net = copy.deepcopy(model)
        if name.startswith("SGD"):
            fused = True if name.endswith("fused") else None
            optimizer = torch.optim.SGD(net.parameters(), **SGD, fused=fused)
        else:
            fused = name.endswith("fused")
            groups = param_groups(net)
            optimizer = DessiLBI(groups, nu=100.0, lam=0.1, **SGD, fused=fused)
        found[name] = net, optimizer
    return found


def train_step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """One batch; returns the seconds of the optimizer's step alone."""
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def epoch(runs: dict, images: int, seed: int) -> dict[str, dict[str, float]]:
    """One epoch of all contenders; seconds of the whole, and of the steps alone."""
    generator = torch.Generator().manual_seed(seed)
    totals = {name: {"seconds": 0.0, "step_seconds": 0.0} for name in runs}
    pairs: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(images // BATCH):
        x = torch.randn(BATCH, 3, 32, 32, generator=generator)
        y = torch.randint(10, (BATCH,), generator=generator)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            net, optimizer = runs[name]
            start = time.perf_counter()
            step = train_step(net, optimizer, x, y)
            seconds = time.perf_counter() - start
            totals[name]["seconds"] += seconds
            totals[name]["step_seconds"] += step
            pairs[name].append(seconds)
    for name, times in pairs.items():
        ratios = [mine / theirs for mine, theirs in zip(times, pairs["SGD"], strict=True)]
        totals[name]["ratio_median"] = statistics.median(ratios)
        totals[name]["ms_min"] = 1e3 * min(times)
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=9_600)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DATE-MACHINE")
    arguments = parser.parse_args()
    building.build()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    runs = contenders(build_model("resnet20", num_classes=10, in_channels=3, seed=0))
    for name in ("DessiLBI fused", "DessiLBI reference"):  # about 100 points in 200 epochs
        DensityPath(runs[name][1], total_steps=200 * (arguments.images // BATCH))
    epoch(runs, 3 * BATCH, seed=0)
    epochs = []
    for number in range(arguments.epochs):
        totals = epoch(runs, arguments.images, seed=1 + number)
        base = totals["SGD"]
        for name, own in totals.items():
            own["ratio"] = own["seconds"] / base["seconds"]
            own["step_share"] = own["step_seconds"] / base["seconds"]
            print(
                f"epoch {number}  {name:20} {own['seconds']:7.1f} s  x {own['ratio']:.3f} "
                f"(median of batches {own['ratio_median']:.3f}), "
                f"step alone {100 * own['step_share']:.2f} % of SGD's epoch",
                flush=True,
            )
        epochs.append(totals)
    seconds = {name: sum(own[name]["seconds"] for own in epochs) for name in runs}
    ratios = {name: own / seconds["SGD"] for name, own in seconds.items()}
    print("all epochs", {name: round(ratio, 3) for name, ratio in ratios.items()}, flush=True)
    folder = arguments.out or RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{platform.machine()}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / f"train-overhead-{arguments.threads}.json",
        {
            "machine": machine(),
            "model": "ResNet-20, images 3 x 32 x 32",
            "batch": BATCH,
            "images": arguments.images,
            "threads": arguments.threads,
            "load": os.getloadavg()[0],
            "ratios": ratios,
            "epochs": epochs,
        },
    )


if __name__ == "__main__":
    main()
