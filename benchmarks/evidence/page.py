# SPDX-License-Identifier: Apache-2.0
"""Write docs/evidence.md from docs/results/evidence.jsonl; what is missing is shown empty.

python -m benchmarks.evidence.page [--results FILE] [--out FILE]
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.evidence.plan import TASKS, planned
from benchmarks.evidence.settings import (
    CHANGES,
    CONTROLLED,
    CUTS,
    DENSITIES,
    EARLY_DENSITIES,
    SEEDS,
    SHARES,
    TEXT_DENSITIES,
    TRIALS,
)
from benchmarks.evidence.verdicts import early_goal, optimizers_goal, tally

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
RESULTS = ROOT / "docs" / "results" / "evidence.jsonl"
PAGE = ROOT / "docs" / "evidence.md"
WHOLE = ", nothing retrained"
Line = dict[str, Any]
NAMES = {
    "sgd": "SGD, momentum",
    "nesterov": "SGD, Nesterov",
    "sgd-decay": "SGD, weight decay",
    "sgd-l1": "SGD, L1 subgradient",
    "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
    "adam": "Adam",
    "adamw": "AdamW",
    "dessilbi": "**DessiLBI**, one search for all",
    "dessilbi-target": "**DessiLBI**, one run per density",
    "dessilbi-tight": "**DessiLBI**, one search for all, tails that tighten",
    "dessilbi-filter": "**DessiLBI**, filters and neurons",
    "dessilbi-adamw": "**DessiLBI** around AdamW",
    "one-shot": "one-shot magnitude",
    "one-shot-tight": "one-shot magnitude, tails that tighten",
    "gradual": "gradual magnitude",
    "linbreg": "LinBreg",
    "adabreg": "AdaBreg",
    "iterative": "iterative magnitude, rewound (2 to 5 times the training)",
    "group-lasso": "group lasso, proximal SGD",
    "magnitude": "magnitude of units",
    "slimming": "network slimming",
    "torch-pruning": "Torch-Pruning, GroupNormPruner",
}


def pick(lines: Sequence[Line], **wanted: Any) -> list[Line]:
    """Return the reported lines that have these values."""
    return [
        x for x in lines if x["trial"] is None and all(x[key] == v for key, v in wanted.items())
    ]


def shown(lines: Sequence[Line], key: str, *, points: bool = True) -> str:
    """Return mean and deviation over the seeds, and how many there are if not all."""
    values = [x[key] * (100 if points else 1) for x in lines if key in x]
    if not values:
        return ""
    digits = 2 if points else 3
    text = f"{mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.{digits}f}"
    return text if len(values) == len(SEEDS) else f"{text} ({len(values)})"


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in lines) + "\n"


def grid(
    lines: Sequence[Line],
    part: str,
    budgets: Sequence[object],
    key: str,
    *,
    points: bool = True,
    methods: Sequence[str] | None = None,
) -> str:
    """Return methods against budgets."""
    rows = []
    for method in methods or list(TRIALS[part]):
        own = [pick(lines, part=part, method=method, budget=budget) for budget in budgets]
        rows.append([NAMES[method], *(shown(x, key, points=points) for x in own)])
    return table(["", *budgets], rows)


def part_a(lines: Sequence[Line]) -> str:
    rows = []
    for method in TRIALS["a"]:
        found = [pick(lines, part="a", method=method, task=task) for task in TASKS["a"]]
        ticket = [shown(x, "once_test_accuracy") for x in found]
        rows.append([NAMES[method], *(shown(x, "test_accuracy") for x in found), *ticket])
    head = ["", "Fashion-MNIST, W", "MNIST, W", "Fashion-MNIST, ticket", "MNIST, ticket"]
    return table(head, rows) + "\n" + optimizers_goal(lines)


def part_b(lines: Sequence[Line]) -> str:
    dense = shown(pick(lines, part="b", method="iterative", budget=1.0), "test_accuracy")
    end = grid(lines, "b", DENSITIES, "test_accuracy", methods=[*TRIALS["b"], "iterative"])
    once = grid(lines, "b", DENSITIES, "once_test_accuracy")
    return (
        f"Dense, SGD, E: {dense}. At the end of the training, by density:\n\n{end}\n"
        f"Right after extraction, nothing retrained (gradual and iterative pruning have no such "
        f"moment):\n\n{once}\n" + tally(lines, "b", DENSITIES, NAMES)
    )


def part_c(lines: Sequence[Line]) -> str:
    budgets = list(CUTS)
    end = grid(lines, "c", budgets, "test_accuracy")
    once = grid(lines, "c", budgets, "once_test_accuracy")
    left = grid(lines, "c", budgets, "macs_left")
    return (
        f"At the end of the training, by the factor that MACs were cut by:\n\n{end}\n"
        f"Right after removal:\n\n{once}\nMACs left, in % of the dense network's:\n\n{left}\n"
        + tally(lines, "c", budgets, NAMES)
    )


def part_h(lines: Sequence[Line]) -> str:
    return (
        grid(lines, "h", DENSITIES, "test_accuracy")
        + "\n"
        + tally(lines, "h", DENSITIES, NAMES, {"test_accuracy": "Nothing retrained"})
        + "\n"
        + tally(
            [x for x in lines if x["method"] not in ("dessilbi-target", "gradual")],
            "h",
            DENSITIES,
            NAMES,
            {"test_accuracy": "Families of one search alone"},
        )
        + "\n"
        + _together(lines)
    )


def _together(lines: Sequence[Line]) -> str:
    """Verdicts over the lines of (b) and (h) at once: all of them cost E for each model."""
    both = [x for x in lines if x["part"] == "b"]
    both += [x | {"part": "b", "method": x["method"] + WHOLE} for x in lines if x["part"] == "h"]
    names = NAMES | {method + WHOLE: told + WHOLE for method, told in NAMES.items()}
    return tally(both, "b", DENSITIES, names, {"test_accuracy": "All lines of (b) and (h)"})


def part_i(lines: Sequence[Line]) -> str:
    budgets = list(CUTS)
    return (
        grid(lines, "i", budgets, "test_accuracy")
        + "\n"
        + tally(lines, "i", budgets, NAMES, {"test_accuracy": "Nothing retrained"})
    )


def part_d(lines: Sequence[Line]) -> str:
    text = ""
    for task, name in (("fashion", "Fashion-MNIST"), ("mnist", "MNIST")):
        own = pick(lines, part="d", task=task)
        rows = [["dense", shown([x for x in own if x["budget"] == "dense"], "test_accuracy")]]
        rows[0] += [""] * (len(EARLY_DENSITIES) - 1)
        for share in SHARES:
            found = [x for x in own if x["change"] == f"{share:g}"]
            rows.append([f"found at {share:.0%}, rewound", *_by(found, "rewind", "test_accuracy")])
        found = [x for x in own if x["change"] == "0.25"]
        rows.append(["found at 25%, fresh initialisation", *_by(found, "reinit", "test_accuracy")])
        rows.append(["random, same layers", *_by(found, "random", "test_accuracy")])
        rounds = [
            shown([x for x in own if x["budget"] == d], "test_accuracy") for d in EARLY_DENSITIES
        ]
        rows.append(["iterative magnitude, rewound", *rounds])
        for share in SHARES:
            found = [x for x in own if x["change"] == f"{share:g}"]
            once = _by(found, "rewind", "once_test_accuracy")
            rows.append([f"right after extraction at {share:.0%}", *once])
        head = [name, *(f"density {d}" for d in EARLY_DENSITIES)]
        text += table(head, rows) + "\n" + early_goal(own, name) + "\n"
    return text


def _by(lines: Sequence[Line], kind: str, key: str) -> list[str]:
    wanted = EARLY_DENSITIES if kind == "rewind" else CONTROLLED
    found = {d: shown([x for x in lines if x["budget"] == f"{kind} {d}"], key) for d in wanted}
    return [found.get(d, "not run") for d in EARLY_DENSITIES]


def part_e(lines: Sequence[Line]) -> str:
    same = pick(lines, part="b", method="dessilbi", budget=0.05)
    rows = [["as in (b)", *_sensitivity(same)]]
    rows += [[name, *_sensitivity(pick(lines, part="e", change=name))] for name in CHANGES]
    head = ["change", "ticket of .05 at once", "at the end", "density of supp Γ (in %)"]
    return table(head, rows)


def _sensitivity(lines: Sequence[Line]) -> list[str]:
    return [
        shown(lines, "once_test_accuracy"),
        shown(lines, "test_accuracy"),
        shown(lines, "support"),
    ]


def part_f(lines: Sequence[Line]) -> str:
    dense = shown(pick(lines, part="f", method="adamw"), "test_loss", points=False)
    methods = [method for method in TRIALS["f"] if method != "adamw"]
    end = grid(lines, "f", TEXT_DENSITIES, "test_loss", points=False, methods=methods)
    once = grid(lines, "f", TEXT_DENSITIES, "once_test_loss", points=False, methods=methods)
    return (
        f"Dense, AdamW, E: {dense}. Loss at the end, by density of heads and neurons:\n\n{end}\n"
        f"Right after extraction:\n\n{once}"
    )


def cost(lines: Sequence[Line]) -> str:
    """What a frontier of 10 points costs, in trainings of E."""
    rows = []
    for method, searches in (
        ("dessilbi", 1),
        ("dessilbi-target", 10),
        ("one-shot", 1),
        ("linbreg", 1),
        ("adabreg", 1),
        ("gradual", 10),
        ("iterative", 1),
    ):
        own = pick(lines, part="b", method=method, budget=0.05)
        dense = [x["macs"] for x in pick(lines, part="b", method="iterative", budget=1.0)]
        if not own or not dense:
            rows.append([NAMES[method], "", ""])
            continue
        whole, search = mean(x["macs"] for x in own), mean(x.get("search_macs", 0.0) for x in own)
        family = searches == 1 and method != "iterative"
        alone = search / mean(dense) if family else None
        total = search + 10 * (whole - search) if family else 10 * whole
        if method == "iterative":
            total = 11 * mean(dense)  # the dense net and ten rounds
        rows.append(
            [NAMES[method], f"{total / mean(dense):.1f}", "" if alone is None else f"{alone:.1f}"]
        )
    head = ["", "10 models, trained to the end", "10 models, nothing retrained"]
    return table(head, rows)


def trials_table(lines: Sequence[Line]) -> str:
    """All trials, so that anyone sees what was tried."""
    rows = []
    for part, offered in TRIALS.items():
        for method, settings in offered.items():
            for number, setting in enumerate(settings):
                found = [
                    x for x in lines
                    if (x["part"], x["method"], x["trial"]) == (part, method, number)
                ]  # fmt: skip
                score = "" if not found else f"{100 * found[0]['val_accuracy']:.2f}"
                if found and part == "f":
                    score = f"{found[0]['val_loss']:.3f}"
                told = ", ".join(f"{key} {value}" for key, value in setting.items())
                rows.append([part, NAMES[method].replace("*", ""), told, score])
    return table(["part", "method", "setting", "validation"], rows)


PARTS: dict[str, Callable[[Sequence[Line]], str]] = {
    "(a) Optimizers: accuracy of W": part_a,
    "(b) Single weights, LeNet on Fashion-MNIST": part_b,
    "(c) Filters, ResNet-8 on CIFAR-10": part_c,
    "(d) Early tickets": part_d,
    "(e) Sensitivity": part_e,
    "(f) Character GPT": part_f,
    "(h) Single weights, nothing retrained: all of E is the search": part_h,
    "(i) Filters, nothing retrained: all of E is the search": part_i,
    "Cost of a frontier of 10 densities, in dense trainings": cost,
    "All trials": trials_table,
}


def text_of(lines: Sequence[Line]) -> str:
    """Return the page."""
    wanted = {job.cell(budget) for job in planned() for budget in job.budgets}
    there = {x["cell"] for x in lines} & wanted
    parts = [(FOLDER / "page_head.md").read_text(encoding="utf-8").strip()]
    parts.append(f"{len(there)} of {len(wanted)} lines of the plan are there.")
    parts += [f"## {title}\n\n{write(lines).strip()}" for title, write in PARTS.items()]
    parts.append((FOLDER / "page_notes.md").read_text(encoding="utf-8").strip())
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=PAGE)
    asked = parser.parse_args()
    text = asked.results.read_text(encoding="utf-8") if asked.results.exists() else ""
    lines = {x["cell"]: x for x in map(json.loads, text.splitlines())}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(text_of(list(lines.values())), encoding="utf-8")
    print(f"{asked.out}: {len(lines)} lines")


if __name__ == "__main__":
    main()
