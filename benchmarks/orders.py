# SPDX-License-Identifier: Apache-2.0
"""Orders: networks cut to a share of their MACs, by each order of the path's tickets.

    python -m benchmarks.orders --data DIR

Protocol. Data, networks and schedule are those of parts (a) and (c) of
benchmarks/evidence/PROTOCOL.md (LeNet on Fashion-MNIST, ResNet-8 on CIFAR-10); scores are of the
validation part, seeds 100 to 102: the test part is not read. Per seed one search over 60 % of E
with filters coupled into units, one lambda for all layers (lr 0.07 and 0.1, weight decay 5e-4,
R = 2, density control at .3). Then for every order and cut the ticket is removed, BatchNorm
statistics are estimated anew (once), and the smaller network is trained for the rest of E (end).
One JSON line per cell in docs/results/orders.jsonl; what is there is not run again. About 8
core-minutes.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.evidence.methods import ours
from benchmarks.evidence.parts.filters import DECAY, SEARCH, filter_groups
from benchmarks.evidence.tasks import task
from benchmarks.evidence.training import Stage, fit, judged, quick, sgd

from dessilbi import compact
from dessilbi.compaction.certifying import SilentError
from dessilbi.files.storage import append_line
from dessilbi.path.scores import ORDERS
from dessilbi.training.evaluation import recalibrated

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "orders.jsonl"
PAGE = ROOT / "docs" / "results" / "orders.md"
RATES = {"fashion": 0.07, "cifar": 0.1}
SEEDS, CUTS = (100, 101, 102), (2, 4, 8)
COUPLING, AIM = 2.0, 0.3
TITLES = {"fashion": "LeNet, Fashion-MNIST", "cifar": "ResNet-8, CIFAR-10"}


def lines() -> list[dict[str, Any]]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def measure(name: str, seed: int, root: str) -> Iterator[dict[str, Any]]:
    """Yield a line for every order and cut."""
    data = task(name, root)
    model, first, lr = data.model(seed), int(SEARCH * data.steps), RATES[name]
    options = {"lr": lr, "decay": DECAY, "density": AIM, "coupling": COUPLING}
    groups = filter_groups(data, model)
    found = ours.search(data, model, groups, Stage(data.steps, 0, first), seed=seed, **options)
    assert found.path is not None
    searched, example = judged(data, model, reported=False)["val_accuracy"], data.example()
    for order in ORDERS:
        family = found.path.family(model, example_inputs=example, order=order)
        for cut in CUTS:
            cell = {"task": name, "seed": seed, "order": order, "cut": cut, "searched": searched}
            ticket = family.choose("macs", 1 / cut).ticket
            kept = {weight: int(mask.sum()) for weight, mask in ticket.items()}
            try:
                smaller = compact(model, ticket, example_inputs=example).model
            except SilentError:  # what is left does not see its input any more
                yield cell | {"once": None, "end": None, "kept": kept}
                continue
            net = recalibrated(smaller, data.train)
            once = judged(data, net, reported=False)["val_accuracy"]
            tail = sgd(net, lr, weight_decay=DECAY)
            fit(data, net, tail, Stage(data.steps, first), seed=seed)
            end = judged(data, net, reported=False)["val_accuracy"]
            yield cell | {"once": once, "end": end, "kept": kept}


def shown(values: list[float | None]) -> str:
    """Mean and deviation in percent; a dead network counts as a tenth, as guessing does."""
    if not values:
        return ""
    known = [0.1 if value is None else value for value in values]
    dead = sum(value is None for value in values)
    told = f"{100 * statistics.mean(known):.1f} ± {100 * statistics.pstdev(known):.1f}"
    return told + (f" ({dead} dead)" if dead else "")


def write_page() -> None:
    """Write the table from the lines."""
    found = lines()
    text = [
        "# Orders of tickets",
        "",
        "Written by `python -m benchmarks.orders`, whose first lines are the protocol, from",
        "[these lines](orders.jsonl). Validation accuracy in %, means and deviations of three",
        "seeds, MACs cut by 2, 4, 8; dead: the output does not depend on the input any more.",
    ]
    for name, title in TITLES.items():
        text += [
            "",
            f"## {title}",
            "",
            "| order | "
            + " | ".join(f"{when}, {cut} x" for when in ("once", "end") for cut in CUTS)
            + " |",
            "|" + "---|" * (1 + 2 * len(CUTS)),
        ]
        for order in ORDERS:
            cells = [
                shown(
                    [
                        line[when]
                        for line in found
                        if (line["task"], line["order"], line["cut"]) == (name, order, cut)
                    ]
                )
                for when in ("once", "end")
                for cut in CUTS
            ]
            text.append(f"| {order} | " + " | ".join(cells) + " |")
    PAGE.write_text("\n".join(text) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    asked = parser.parse_args()
    quick()
    warnings.simplefilter("ignore")
    for seed in SEEDS:
        for name in RATES:
            done = [line for line in lines() if (line["task"], line["seed"]) == (name, seed)]
            if len(done) == len(ORDERS) * len(CUTS):
                continue
            there = {(line["order"], line["cut"]) for line in done}
            for line in measure(name, seed, asked.data):
                if (line["order"], line["cut"]) not in there:
                    append_line(RESULTS, line)
                    print({k: v for k, v in line.items() if k != "kept"}, flush=True)
    write_page()


if __name__ == "__main__":
    main()
