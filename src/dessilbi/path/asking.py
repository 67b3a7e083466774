# SPDX-License-Identifier: Apache-2.0
"""Asking: what a path can be asked for, and the sentence where it cannot."""

import math

from dessilbi.choosing.choosing import QUANTITIES, Quantity
from dessilbi.path.history import History


def check_numbers(every: int | None, total_steps: int | None, total_time: float | None) -> None:
    """Check what a path is told of its run.

    Raises:
        ValueError: A number is not > 0, or not of its kind.
    """
    for name, value in (("every", every), ("total_steps", total_steps)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name}={value!r} is not allowed: it must be a whole number >= 1")
    if total_time is not None and not 0 < total_time < math.inf:
        raise ValueError(f"total_time={total_time!r} is not allowed: it must be > 0, finite")


def one_budget(
    step: int | None, budgets: tuple[float | None, ...], model: object, example_inputs: object
) -> tuple[Quantity, float]:
    """Return the one budget by which a ticket is asked for, and its limit; density 1 for a step.

    Args:
        step: By the step of first entry.
        budgets: By one of the quantities of :mod:`dessilbi.choosing.choosing`, in their order.
        model: Needed by all budgets but density.
        example_inputs: Given where the model is.

    Raises:
        ValueError: None or several are given, or what one needs is missing.
    """
    found = zip(QUANTITIES, budgets, strict=True)
    given = [(quantity, limit) for quantity, limit in found if limit is not None]
    if len(given) + (step is not None) != 1:
        raise ValueError("give exactly one of density, step, params, macs and bytes")
    if (model is None) != (example_inputs is None):
        raise ValueError("give model and example_inputs together to path.ticket, or neither")
    quantity, limit = given[0] if given else ("density", 1.0)
    if model is None and quantity != "density":
        raise ValueError(f"a ticket by {quantity} needs the model and example_inputs")
    return quantity, limit


def check_step(history: History, step: int, last: int) -> None:
    """Check that a path had begun by a step, and had come that far.

    Raises:
        ValueError: It had not.
    """
    first = history.first_step
    if first is None:
        raise ValueError(f"step={step!r} cannot be answered: this path has recorded nothing yet")
    if not first <= step <= last:
        side = f"before the path: its first step is {first}"
        if step > last:
            side = f"behind the path: its last step is {last}"
        raise ValueError(f"step={step!r} comes {side}")
