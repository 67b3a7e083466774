# SPDX-License-Identifier: Apache-2.0
"""Settling: when along a path the support has stopped changing, so that a ticket can be drawn.

The authors stop at an epoch they guess. Here three things must hold over a window of recorded
points: supp(Gamma) changed little, the ticket on it (W on the support, nothing retrained) did not
get better, and it is about as good as W itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # recipes take their defaults from here, before torch is loaded
    from dessilbi.blocks.ticket import Ticket
    from dessilbi.path.path import Path

WINDOW, TOLERANCE, GAIN, GAP = 10, 0.05, 0.002, 0.02  # see settled
ACCURACY, DENSE = "val_ticket_accuracy", "val_accuracy"


@dataclass(frozen=True)
class Settled:
    """Where a path settled: the recorded point, how far it had moved, and why it counts.

    ``distance`` is the share of elements of either support that the two do not have in common
    (0: the same, 1: disjoint); ``gain`` the ticket's accuracy gained over the window, ``gap`` how
    far it lay below that of W.
    """

    step: int
    time: float
    distance: float
    gain: float
    accuracy: float
    gap: float = 0.0


def distance(one: "Ticket", two: "Ticket") -> float:
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
    path: "Path",
    *,
    window: int = WINDOW,
    tolerance: float = TOLERANCE,
    gain: float = GAIN,
    gap: float = GAP,
    metric: str = ACCURACY,
    dense: str = DENSE,
) -> Settled | None:
    """Return the first recorded point at which the path has settled, or None.

    Only points that carry the accuracy count: each is compared with the latest such point at
    least a window before it.

    Args:
        path: A path whose points carry the ticket's accuracy (``path.log``).
        window: How many recorded points it must have stood still.
        tolerance: The most the support may have changed over the window (Jaccard distance).
        gain: The most the ticket's accuracy may have gained over the window, as a fraction: the
            best up to its end over the best up to its beginning.
        gap: How far the ticket's accuracy may lie below that of W at the same point, where the
            point carries it: a support that stands still because it is empty has not settled.
        metric: Name of the ticket's accuracy among the points' metrics.
        dense: Name of W's accuracy.

    Raises:
        ValueError: A number is out of range, or the points carry no such metric.
    """
    _check(window, tolerance=tolerance, gain=gain, gap=gap)
    for move in _moves(path, window, metric, dense):
        if move.distance <= tolerance and move.gain <= gain and move.gap <= gap:
            return move
    return None


def why_not(
    path: "Path",
    *,
    window: int = WINDOW,
    tolerance: float = TOLERANCE,
    gain: float = GAIN,
    gap: float = GAP,
    metric: str = ACCURACY,
    dense: str = DENSE,
) -> str:
    """Say how far a path that never settled was from it at its end; see :func:`settled`."""
    moves = list(_moves(path, window, metric, dense))
    if not moves:
        return f"it has no two judged points {window} recorded points apart; judge more of them"
    last = moves[-1]
    return (
        f"over its last window the support moved by {100 * last.distance:.2g} % and the ticket "
        f"gained {100 * last.gain:.2g} points of accuracy, {100 * last.gap:.2g} below W; allowed "
        f"are {100 * tolerance:g} %, {100 * gain:g} and {100 * gap:g} points"
    )


def _check(window: int, **shares: float) -> None:
    if window < 1:
        raise ValueError(f"window={window!r} is not allowed: it must be at least 1")
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value!r} is not allowed: it must be from 0 to 1")


def _moves(path: "Path", window: int, metric: str, dense: str) -> Iterator[Settled]:
    """How far each judged point with a support has moved over its window."""
    points = path.points
    judged = [index for index, point in enumerate(points) if metric in point.metrics]
    if points and not judged:
        raise ValueError(
            f"the points of this path carry no {metric!r}: log it with path.log({metric}=...)"
        )
    best: dict[int, float] = {}  # the best accuracy up to each judged point
    for index in judged:
        point = points[index]
        accuracy = float(point.metrics[metric])
        best[index] = max(accuracy, *best.values()) if best else accuracy
        before = max((other for other in judged if other <= index - window), default=None)
        if before is None or point.density == 0:
            continue
        old = path.support(step=points[before].step)
        moved = distance(old, path.support(step=point.step))
        gap = max(0.0, float(point.metrics.get(dense, accuracy)) - accuracy)
        gain = best[index] - best[before]
        yield Settled(point.step, point.time, moved, gain, accuracy, gap)
