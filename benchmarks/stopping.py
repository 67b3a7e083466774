# SPDX-License-Identifier: Apache-2.0
"""Measure stopping early: the epochs that are saved, and what the ticket is worth then.

python benchmarks/stopping.py --data DIR --minutes 8   # measures what is still missing
python benchmarks/stopping.py                          # only writes the page again

One JSON line per cell in docs/results/stopping.jsonl; a cell that is there is not repeated.

Protocol, fixed before the first run that is reported
-----------------------------------------------------
Data: MNIST and Fashion-MNIST, the first 14,800 training images, 2,000 of them (drawn with the seed)
for validation, so that 12,800 train; normalised. The test images decide nothing and are not shown.
Search: LeNet-5, single weights everywhere (recipe mnist-lenet-best), 12 epochs of 100 steps in
batches of 128, lr 0.05 (warm-up, constant to 75 %, cosine to 0), nu 5 (R = T/nu about 10), lam 0.1,
momentum 0.9. 60 points of the path, each judged. Seeds 0, 1, 2 (initialisation, order, validation
images); the setting and the second rule were chosen on seed 100, by validation accuracy.
Rules: "default" is `stop` as `--stop-when-ticket` sets it: over 10 points (2 epochs) the support
moves by at most 5 %, its ticket gains at most 0.2 points and lies at most 2 points below W.
"loose": 25 % and 2 points instead of 5 % and 0.2 points; the window and the 2 points below W stay.
Where a search stops: `settled` on the path of the whole search, which is what a search that stops
asks; until then the two are the same to the bit (tests/training/test_early_stop.py).
Ticket: density 0.1, blocks ranked by the weights as they stood at the stop (a checkpoint at every
point), as `dessilbi ticket RUN --step N --density 0.1` ranks them, beside that of the end.
Retrained: rewound to the initialisation and trained for 6 epochs (lr 0.05, the same shape of
schedule) with the ticket enforced, alike for all. Where a rule never stops, its ticket is that of
the end.
Reported: epochs saved, and the validation accuracy of the retrained ticket less that of the whole
search's; also the accuracy of the whole support at the stop, nothing retrained (`settled`). No
goal was set.
Known from seed 100: the default rule did not fire within 12 epochs on either set, since the support
goes on growing while the learning rate is high; nor, on MNIST, with nu 70
(R = 0.7) or with density control.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from dessilbi.blocks.ticket import Ticket
from dessilbi.files.runs import Run
from dessilbi.files.storage import append_line, read_lines
from dessilbi.outcomes.tickets import Drawer, Wish
from dessilbi.path.settling import settled
from dessilbi.training import retraining
from dessilbi.training.data import DATA_SETS, DataSet
from dessilbi.training.finetune import load_trained
from dessilbi.training.loop import train
from dessilbi.training.recipes import StopRecipe, load_recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "stopping.jsonl"
PAGE = ROOT / "docs" / "results" / "stopping.md"
SETS, SEEDS = ("mnist", "fashion-mnist"), (0, 1, 2)
IMAGES, VALIDATION, EPOCHS, RETRAINED, DENSITY = 12_800, 2_000, 12, 6, 0.1
RULES = {"default": StopRecipe(), "loose": StopRecipe(tolerance=0.25, gain=0.02)}
SETTING = (
    *(f"epochs={EPOCHS}", f"validation={VALIDATION}", "points=60", "retrain.lr=0.05"),
    *("optimizer.lr=0.05", "optimizer.nu=5.0", "optimizer.lam=0.1", "batch_size=128"),
    *("checkpoint_every=0.2", "keep_checkpoints=100", f"retrain.epochs={RETRAINED}"),
    *("retrain.momentum=0.9", "retrain.schedule.kind=hold"),
    "stop.window=1000000",  # judges the ticket at every point and never stops
)


def short(name: str) -> DataSet:
    """Return a set with the first training images only."""
    known = DATA_SETS[name]

    def read(root: str | Path | None, download: bool) -> Any:
        (images, labels), test = known.read(root, download)
        count = IMAGES + VALIDATION
        return (images[:count], labels[:count]), test

    return replace(known, read=read)


def measured(data: str, seed: int, root: str | None) -> list[dict[str, Any]]:
    """Search once, and retrain the ticket of the end and that of each rule."""
    began = time.process_time()
    place = {"data": data, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        asked = (*SETTING, f"data=short-{data}", f"seed={seed}")
        recipe = load_recipe("mnist-lenet-best", asked)
        search = train(recipe, Path(folder) / "search", data_root=root, device="cpu")
        drawer = Drawer(search, data_root=root)
        whole = drawer.draw(Wish(density=DENSITY))
        last = {
            "density": whole.ticket.density,
            "retrained": retrained(search, whole.ticket, Path(folder) / "end", root),
        }
        told = [place | {"rule": "whole search", "epochs": EPOCHS, "settled": None} | last]
        for name, rule in RULES.items():
            found = settled(drawer.path, **rule.model_dump())
            line = last
            if found is not None:
                ticket = drawer.family(step=found.step).choose("density", DENSITY).ticket
                line = {
                    "density": ticket.density,
                    "retrained": retrained(search, ticket, Path(folder) / name, root),
                    "in_common": shared(ticket, whole.ticket),
                }
            epochs = found.step * EPOCHS / drawer.path.step if found else EPOCHS
            where = asdict(found) if found else None
            told.append(place | {"rule": name, "epochs": epochs, "settled": where} | line)
    seconds = time.process_time() - began
    return [line | {"core_seconds": seconds} for line in told]


def shared(one: Ticket, other: Ticket) -> float:
    """The share of the first ticket's weights that the other keeps, too."""
    both = sum(int((one[name] & other[name]).sum()) for name in one if name in other)
    return both / one.kept_elements


def retrained(search: Run, ticket: Ticket, folder: Path, root: str | None) -> float:
    """The validation accuracy of a ticket, rewound and trained again."""
    trained = load_trained(search, data_root=root)
    wish = retraining.Wish(mode="rewind")
    recipe, start = retraining.retraining(search, trained, ticket, wish, trained.data)
    run = train(recipe, folder, data_root=root, device="cpu", start=start)
    return float(run.read_status()["val_accuracy"])


def shown(values: list[float], factor: float = 1.0) -> str:
    spread = f" ± {factor * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{factor * mean(values):.2f}{spread}"


def page(lines: list[dict[str, Any]]) -> str:
    """The page of all cells."""
    seconds = sum(line["core_seconds"] for line in lines if line["rule"] == "whole search")
    seeds_of = {d: sorted({str(x["seed"]) for x in lines if x["data"] == d}) for d in SETS}
    there = "; ".join(f"{data}, seeds {', '.join(seeds)}" for data, seeds in seeds_of.items())
    parts = [
        "# Stopping early, measured",
        "",
        "Written by `python benchmarks/stopping.py`, whose head has the protocol; the numbers are",
        f"in [stopping.jsonl](stopping.jsonl). {seconds / 60:.1f} minutes of a core in all.",
        "Accuracies on the validation images, in %; tickets of density",
        f"{DENSITY}, rewound and trained for {RETRAINED} epochs. Mean and deviation over",
        "the seeds; the difference is taken seed by seed.",
        f"Measured: {there}; the protocol asks for seeds 0, 1, 2 of both.",
        "",
        "| data | rule | stopped | epochs saved | retrained | less the whole search's |",
        "|---|---|---|---|---|---|",
    ]
    for data in SETS:
        mine = {(x["rule"], x["seed"]): x for x in lines if x["data"] == data}
        seeds = sorted({x["seed"] for x in mine.values()})
        for rule in ("whole search", *RULES) if seeds else ():
            own = [mine[rule, seed] for seed in seeds]
            ends = [mine["whole search", seed]["retrained"] for seed in seeds]
            saved = [EPOCHS - x["epochs"] for x in own]
            less = [x["retrained"] - end for x, end in zip(own, ends, strict=True)]
            count = sum(x["settled"] is not None for x in own)
            told = f"{count} of {len(own)} | {shown(saved)} of {EPOCHS}"
            end = rule == "whole search"
            reached = shown([x["retrained"] for x in own], 100)
            cells = (
                data,
                rule,
                "- | -" if end else told,
                reached,
                "-" if end else shown(less, 100),
            )
            parts.append(f"| {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"


def main() -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("DESSILBI_DATA"))
    parser.add_argument("--minutes", type=float, default=0.0, help="of one core, at most")
    parser.add_argument("--trial", metavar="SET", help="seed 100 of a set, printed and not kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in SETS:
        DATA_SETS[f"short-{name}"] = short(name)
    if options.trial:
        for line in measured(options.trial, 100, options.data):
            print(json.dumps(line))
        return
    done = list(read_lines(RESULTS)) if RESULTS.exists() else []
    known = {(line["data"], line["seed"]) for line in done}
    for seed in SEEDS:
        for data in SETS:
            if (data, seed) in known or time.process_time() > 60 * options.minutes:
                continue
            for line in measured(data, seed, options.data):
                append_line(RESULTS, line)
                done.append(line)
    PAGE.write_text(page(done))


if __name__ == "__main__":
    main()
