# SPDX-License-Identifier: Apache-2.0
"""The trials: what every method may try on the validation part, with seed 100."""

from typing import Any

Setting = dict[str, Any]
TUNING_SEED = 100
SEEDS = (0, 1, 2)

DENSITIES = (0.3, 0.1, 0.05, 0.02)  # (b)
CUTS = (2, 4, 8)  # (c): MACs divided by
TEXT_DENSITIES = (0.75, 0.5, 0.25)  # (f)
SHARES = (0.1, 0.25, 0.5)  # (d): of E
EARLY_DENSITIES = (0.2, 0.1, 0.05)  # (d)
CONTROLLED = (0.1, 0.05)  # (d): of fresh initialisations and random tickets
ROUNDS = (0.45, 0.2, 0.1, 0.05)  # (d): iterative magnitude pruning

# The budget at which trials are made; the setting holds for all budgets.
TUNED_AT: dict[str, float] = {"a": 1.0, "b": 0.05, "c": 4, "f": 0.5, "h": 0.05, "i": 4}


def grid(
    first: str, values: tuple[Any, ...], second: str = "", others: tuple[Any, ...] = ()
) -> list[Setting]:
    """Return all combinations of two parameters.

    >>> grid("lr", (0.1, 0.2), "own", (3,))
    [{'lr': 0.1, 'own': 3}, {'lr': 0.2, 'own': 3}]
    """
    if not second:
        return [{first: value} for value in values]
    return [{first: value, second: other} for value in values for other in others]


TRIALS: dict[str, dict[str, list[Setting]]] = {
    "a": {
        "sgd": grid("lr", (0.03, 0.05, 0.08)),
        "nesterov": grid("lr", (0.03, 0.05, 0.08)),
        "sgd-decay": grid("lr", (0.04, 0.07), "own", (5e-4, 5e-3)),
        "sgd-l1": grid("lr", (0.04, 0.07), "own", (1e-5, 1e-4)),
        "adagrad": grid("lr", (0.005, 0.01, 0.02)),
        "rmsprop": grid("lr", (5e-4, 1e-3, 2e-3)),
        "adam": grid("lr", (1e-3, 2e-3, 4e-3)),
        "adamw": grid("lr", (1e-3, 3e-3), "own", (0.01, 0.1)),
        "dessilbi": grid("lr", (0.04, 0.07), "coupling", (1.0, 4.0)),
        "dessilbi-filter": grid("lr", (0.04, 0.07), "coupling", (1.0, 4.0)),
        "dessilbi-adamw": grid("lr", (1e-3, 3e-3), "coupling", (1.0, 4.0)),
    },
    "b": {
        "dessilbi": grid("lr", (0.04, 0.07), "coupling", (2.0, 5.0)),
        # one parameter: weak coupling and tickets enforced on the way, or stronger and none
        "dessilbi-target": grid("lr", (0.04, 0.07), "style", ("tightened", "free")),
        "dessilbi-tight": [
            {"coupling": 2.0} | setting for setting in grid("lr", (0.04, 0.07), "first", (0.1, 0.2))
        ],
        "one-shot": grid("lr", (0.04, 0.07), "decay", (5e-4, 5e-3)),
        "one-shot-tight": [
            {"decay": 5e-4} | setting for setting in grid("lr", (0.04, 0.07), "first", (0.1, 0.2))
        ],
        "gradual": grid("lr", (0.04, 0.07), "decay", (5e-4, 5e-3)),
        "linbreg": grid("lr", (0.3, 0.6), "lam", (0.02, 0.1)),
        "adabreg": grid("lr", (2e-3, 5e-3), "lam", (0.01, 0.05)),
    },
    "c": {
        "dessilbi": grid("lr", (0.05, 0.1), "coupling", (1.0, 2.0)),
        "group-lasso": grid("lr", (0.05, 0.1), "strength", (3e-4, 1e-3)),
        "magnitude": grid("lr", (0.05, 0.1), "decay", (5e-4, 5e-3)),
        "slimming": grid("lr", (0.05, 0.1), "strength", (1e-4, 1e-3)),
        "torch-pruning": grid("lr", (0.05, 0.1), "strength", (1e-4, 1e-3)),
    },
    "f": {
        "dessilbi-adamw": grid("lr", (2e-3, 4e-3), "coupling", (4.0, 10.0)),
        "magnitude": grid("lr", (2e-3, 4e-3), "decay", (0.01, 0.1)),
        "adamw": grid("lr", (2e-3, 4e-3), "decay", (0.01, 0.1)),
    },
}

# Nothing retrained: single weights (h) and filters (i). What DessiLBI may try is stronger coupling
# than in (b) and (c); the rivals try what they try there.
TRIALS["h"] = {m: tried for m, tried in TRIALS["b"].items() if not m.endswith("-tight")} | {
    "dessilbi": grid("lr", (0.04, 0.07), "coupling", (4.0, 10.0)),
    "dessilbi-target": grid("lr", (0.04, 0.07), "coupling", (1.0, 4.0)),
}
TRIALS["i"] = TRIALS["c"] | {"dessilbi": grid("lr", (0.05, 0.1), "coupling", (2.0, 10.0))}

# (e): one change at a time of the family run of (b)
CHANGES: dict[str, Setting] = {
    f"{name} x {factor:g}": {name: factor}
    for name in ("nu", "kappa", "lambda")
    for factor in (0.25, 0.5, 2, 4)
}
