# SPDX-License-Identifier: Apache-2.0
"""Settling: when along a path the support has stopped changing, so that a ticket can be drawn.

The authors stop at an epoch they guess. Here two things must hold over a window of recorded
points: supp(Gamma) changed little, and the ticket on it (W on the support, nothing retrained) did
not get better.
"""

from dataclasses import dataclass

from dessilbi.path import Path
from dessilbi.ticket import Ticket

ACCURACY = "val_ticket_accuracy"


@dataclass(frozen=True)
class Settled:
    """Where a path settled: the recorded point, how far it had moved, and why it counts.

    ``distance`` is the share of elements of either support that the two do not have in common
    (0: the same, 1: disjoint); ``gain`` the ticket's accuracy gained over the window.
    """

    step: int
    time: float
    distance: float
    gain: float
    accuracy: float


def distance(one: Ticket, two: Ticket) -> float:
    """Return the share of elements in which two tickets of one run differ.

    |A xor B| / |A or B| in elements, 0 where both are empty (Jaccard distance).
    """
    differ, union = 0, 0
    for name, spec in one.specs.items():
        first, second = one[name], two[name]
        differ += int((first ^ second).sum()) * spec.block_size
        union += int((first | second).sum()) * spec.block_size
    return differ / union if union else 0.0


def settled(
    path: Path,
    *,
    window: int = 10,
    tolerance: float = 0.05,
    gain: float = 0.002,
    metric: str = ACCURACY,
) -> Settled | None:
    """Return the first recorded point at which the path has settled, or None.

    Args:
        path: A path whose points carry the ticket's accuracy (``path.log``).
        window: How many recorded points it must have stood still.
        tolerance: The most the support may have changed over the window (Jaccard distance).
        gain: The most the ticket's accuracy may have gained over the window, as a fraction: the
            best of the window's points over the best before it.
        metric: Name of the accuracy among the points' metrics.

    Raises:
        ValueError: A number is out of range, or the points carry no such metric.
    """
    for name, value, holds in (
        ("window", window, window >= 1),
        ("tolerance", tolerance, 0 <= tolerance <= 1),
        ("gain", gain, 0 <= gain <= 1),
    ):
        if not holds:
            raise ValueError(f"{name}={value!r} is not allowed: see settled() for its range")
    points = path.points
    if points and not any(metric in point.metrics for point in points):
        raise ValueError(
            f"the points of this path carry no {metric!r}: log it with path.log({metric}=...)"
        )
    best: list[float] = []  # the best accuracy up to each point
    for index, point in enumerate(points):
        accuracy = float(point.metrics.get(metric, 0.0))
        best.append(max(accuracy, best[-1] if best else 0.0))
        if index < window or point.density == 0 or best[-1] - best[-1 - window] > gain:
            continue
        before = path.support(step=points[index - window].step)
        moved = distance(before, path.support(step=point.step))
        if moved <= tolerance:
            won = best[-1] - best[-1 - window]
            return Settled(point.step, point.time, moved, won, accuracy)
    return None
