# SPDX-License-Identifier: Apache-2.0
"""Measuring: members of a family chosen by what only a run can tell, latency and accuracy."""

from collections.abc import Callable

import numpy as np
from torch import nn

from dessilbi.blocks.ticket import Ticket
from dessilbi.choosing.choosing import Choice, Family
from dessilbi.compaction.certifying import probes_of
from dessilbi.compaction.compaction import compact
from dessilbi.compaction.proving import measure_latency
from dessilbi.graph.program import ExampleInputs, evaluating

Evaluate = Callable[[Ticket], float]


def choose_by_latency(
    family: Family,
    model: nn.Module,
    limit_ms: float,
    *,
    example_inputs: ExampleInputs,
    repeats: int = 30,
) -> Choice:
    """Return the largest member whose compacted model answers within ``limit_ms`` here and now.

    The median over ``repeats`` runs on this machine, in PyTorch, with these inputs. The choice is
    measured once more at the end and steps down until the median is within the limit or exceeds
    it by less than its own spread.

    Raises:
        ValueError: The limit is not above 0, or even the smallest member is slower.
    """
    if not limit_ms > 0:
        raise ValueError(f"latency_ms={limit_ms!r} is not allowed: it must be above 0")

    def timed(candidate: nn.Module) -> tuple[float, float]:
        with evaluating(candidate):
            return measure_latency(candidate, probes_of(example_inputs)[0], repeats)

    def latency(count: int) -> tuple[float, float] | None:
        ticket, _ = family.member(count)
        try:
            return timed(compact(model, ticket, example_inputs=example_inputs).model)
        except ValueError:  # so little is left that the output is constant: nothing to certify
            return None

    def measured(count: int) -> float:
        return (latency(count) or (0.0, 0.0))[0]

    count, _ = family.within(limit_ms, measured, what="latency in ms")
    found = latency(count)
    while found and found[0] - found[1] > limit_ms and count > family.smallest:
        count = max(family.smallest, int(count * 0.95))
        found = latency(count)
    if not found or found[0] - found[1] > limit_ms:
        raise ValueError(
            f"no ticket of this run whose output depends on the input answers within "
            f"{limit_ms:.4g} ms here: the whole model takes {timed(model)[0]:.4g} ms; ask for more"
        )
    median, spread = found
    ticket, cost = family.member(count)
    reason = (
        f"the largest ticket that answers within {limit_ms:.4g} ms on this machine: "
        f"{median:.3g} +- {spread:.2g} ms, the whole model {timed(model)[0]:.3g} ms"
    )
    return Choice(ticket, cost, count, reason)


def choose_by_drop(
    family: Family, evaluate: Evaluate, max_drop: float, *, dense: float, candidates: int = 16
) -> Choice:
    """Return the smallest member that loses at most ``max_drop`` points of accuracy.

    Members are tried at ``candidates`` sizes (evenly spaced in the logarithm), and between the
    smallest that holds and the next smaller one by bisection, down to one item: the member with
    one item less loses more, or is so small that a layer would be dead.

    Args:
        family: The tickets to choose from.
        evaluate: Closed ticket -> accuracy in [0, 1], on samples kept for choosing.
        max_drop: Points of a hundred, >= 0.
        dense: The accuracy to compare with, in [0, 1].
        candidates: How many sizes are tried.

    Raises:
        ValueError: ``max_drop`` is negative, or no member holds, not even the whole model.
    """
    if not max_drop >= 0:
        raise ValueError(f"max_drop={max_drop!r} is not allowed: it must be at least 0 points")
    floor = dense - max_drop / 100 - 1e-12
    known: dict[int, float] = {}

    def accuracy(count: int) -> float:
        if count not in known:
            known[count] = evaluate(family.member(count)[0])
        return known[count]

    grid = np.unique(
        np.geomspace(family.smallest, len(family), candidates).round().astype(int)
    ).tolist()
    holding = [count for count in grid if accuracy(count) >= floor]
    if not holding:
        best = max(known.values())
        raise ValueError(
            f"no ticket stays within {max_drop:g} points of {dense:.4f}: the best reaches "
            f"{best:.4f}; allow at least {100 * (dense - best):.2f} points"
        )
    high = holding[0]
    low = max((count for count in grid if count < high), default=high - 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if accuracy(middle) >= floor else (middle, high)
    ticket, cost = family.member(high)
    reason = (
        f"the smallest ticket tried within {max_drop:g} points of the validation accuracy "
        f"{dense:.4f}: it has {known[high]:.4f} before any retraining"
    )
    return Choice(ticket, cost, high, reason)
