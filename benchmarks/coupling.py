# SPDX-License-Identifier: Apache-2.0
"""Measure schedules of the coupling on a net with BatchNorm: part of docs/adr/0011.

python benchmarks/coupling.py --minutes 5 --data DIR   # measures what is still missing
python benchmarks/coupling.py                          # only writes the table again

One JSON line per run in docs/results/coupling.jsonl; a run that is there is not repeated.

Protocol, fixed before the first run
------------------------------------
ResNet-8 with BatchNorm on CIFAR-10 (12,800 training images, 2x2 pixels averaged to 16x16,
normalised), batch 32, 6 epochs, 2,400 steps, lr 0.1 (warm-up 10 %, constant to 75 %, cosine to 0;
the variant "cosine" decays from the start), momentum 0.9, no weight decay, no augmentation.
Structure "element" on all weights of convolutions and the linear layer, wanted density 0.05, kept
to the end. Seeds 0 and 1. The validation part (4,000 images) decides: accuracy of W and of tickets
by |W| with densities 0.1, 0.05, 0.02, BatchNorm re-estimated, nothing retrained. The share of dead
units in the worst layer is taken after a tenth of the steps.
"""

import argparse
import math
import os
import time
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from calibration import ROOT, parts_of, write_page
from torch.optim.lr_scheduler import LambdaLR

from dessilbi import DensityControl, DessiLBI, Path, param_groups
from dessilbi.dynamics.clock import PathClock, alphas, set_coupling
from dessilbi.dynamics.monitors import dead_units
from dessilbi.dynamics.scheduling import RAMP, Schedules, piecewise
from dessilbi.files.storage import append_line, read_lines
from dessilbi.models import build_model
from dessilbi.training.evaluation import accuracy, masked

RESULTS = ROOT / "docs" / "results" / "coupling.jsonl"
EPOCHS, BATCH = 6, 32
DENSITIES = (0.1, 0.05, 0.02)
FLAT = ((0.0, 1.0),)
# name -> R, factor of 1/nu over the progress, schedule of the learning rate
VARIANTS: dict[str, tuple[float, Any, str]] = {
    "R 10": (10, FLAT, "hold"),
    "R 10, ramped over 30 %": (10, RAMP, "hold"),
    "R 4, ramped over 30 %": (4, RAMP, "hold"),
    "R 10, switched on at 10 %": (10, ((0.1, 0.0), (0.1, 1.0)), "hold"),
    "R 10, ramped, doubled from 75 % on": (10, (*RAMP, (0.75, 1.0), (1.0, 2.0)), "hold"),
    "R 10, ramped, cosine": (10, RAMP, "cosine"),
}


def factor(schedule: str, progress: float) -> float:
    if schedule == "hold":
        if progress < 0.1:
            return max(progress, 1e-3) / 0.1
        if progress < 0.75:
            return 1.0
        progress = (progress - 0.75) / 0.25
    return 0.5 * (1 + math.cos(math.pi * progress))


def measure(variant: str, seed: int, data: str | None) -> dict[str, Any]:
    train, validation, channels = parts_of("resnet8", data)
    coupling, points, schedule = VARIANTS[variant]
    steps = EPOCHS * train.steps_per_epoch(BATCH)
    model = build_model("resnet8", num_classes=10, in_channels=channels, seed=seed)
    weights = {n for n, p in model.named_parameters() if p.dim() > 1}
    optimizer = DessiLBI(param_groups(model, dict.fromkeys(weights, "element")), momentum=0.9)
    scheduler = LambdaLR(optimizer, lambda step: factor(schedule, step / steps))
    clock = PathClock(alphas(optimizer, scheduler, steps))
    set_coupling(optimizer, coupling, total_time=clock.total, largest_alpha=clock.largest)
    Schedules(optimizer, total_time=clock.total, coupling=piecewise(points))
    DensityControl(optimizer, density=0.05, scheduler=scheduler, total_steps=steps)
    path = Path(optimizer, every=steps)
    began, dead = time.process_time(), {}
    for epoch in range(EPOCHS):
        for inputs, targets in train.batches(epoch, batch_size=BATCH, seed=seed):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            scheduler.step()
            if path.step == steps // 10:
                batch = [train.examples(500)]
                dead = dead_units(model, lambda b: F.cross_entropy(model(b[0]), b[1]), batch)
    seconds = time.process_time() - began
    tickets = {str(d): path.ticket(density=d, order="weight") for d in DENSITIES}
    return {
        "variant": variant,
        "seed": seed,
        "accuracy": accuracy(model, validation),
        "tickets": {d: accuracy(masked(model, t, train), validation) for d, t in tickets.items()},
        "reached": optimizer.support().density,
        "dead_after_warmup": max(dead.values()),
        "cpu_seconds": round(seconds, 1),
        "torch": torch.__version__,
    }


def table(lines: list[dict[str, Any]]) -> str:
    rows = ["| variant | seeds | W | .1 | .05 | .02 | dead after 10 %, worst layer |"]
    rows.append("|---|---|---|---|---|---|---|")
    for variant in VARIANTS:
        own = [line for line in lines if line["variant"] == variant]
        if own:
            told = [mean(line["accuracy"] for line in own)]
            told += [mean(line["tickets"][str(d)] for line in own) for d in DENSITIES]
            dead = max(line["dead_after_warmup"] for line in own)
            cells = " | ".join(f"{100 * value:.1f}" for value in told)
            rows.append(f"| {variant} | {len(own)} | {cells} | {100 * dead:.0f} % |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=0.0, help="start no run after so long")
    parser.add_argument("--data", default=os.environ.get("DESSILBI_DATA"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    lines = list(read_lines(RESULTS)) if RESULTS.exists() else []
    began = time.monotonic()
    for seed in (0, 1):
        for variant in VARIANTS:
            if any((line["variant"], line["seed"]) == (variant, seed) for line in lines):
                continue
            if time.monotonic() - began > 60 * arguments.minutes:
                break
            lines.append(measure(variant, seed, arguments.data))
            append_line(RESULTS, lines[-1])
            print(lines[-1], flush=True)
    if lines:
        write_page("coupling", table(lines) + "\n")


if __name__ == "__main__":
    main()
