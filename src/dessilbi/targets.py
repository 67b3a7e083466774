# SPDX-License-Identifier: Apache-2.0
"""Targets: a density that is wanted of some blocks, and the lambda that will give it.

The lambda of a density is a norm of V: that which the wanted share of blocks exceeds. What it will
have become at the end is foreseen from how it has grown (docs/density.md).
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from dessilbi import dual
from dessilbi.levels import Blocks
from dessilbi.storage import from_number

SHORT = 0.08  # early on, growth is taken over this share of the path time
LONG = 0.1  # ... and over two of these as soon as there are two, to see how fast it slows down
POOL = (0.85, 1.0, 1.2, 1.5)  # times the wanted density: one quantile alone grows in jumps
ALMOST_ALL = 0.95
LATEST = 0.5  # a late lambda is chosen by this share of the path time


class Record(NamedTuple):
    """What a target saw and said: ``level`` is q now, ``lam`` what was set (inf: nothing yet)."""

    step: int
    time: float
    level: float
    lam: float


def extrapolated(level: float, slope: float, left: float, pull: float) -> float:
    """Return the norm that ``level`` will have grown to after ``left`` more of path time.

    With q the level, s its slope, H the time left and x = pull H/2 this is
    sqrt( (q + s H) (q + s H (1 - exp(-x))/x) ): the middle between weights that stay as they are
    and weights that the coupling alone lets decay.

    Args:
        level: A norm of V now.
        slope: Its growth per path time.
        left: Path time to go, H.
        pull: kappa/nu.

    >>> extrapolated(1.0, 0.5, 0.0, 1.0)
    1.0
    >>> round(extrapolated(1.0, 0.5, 2.0, 1.0), 3)
    1.807
    """
    x = left * pull / 2
    lasting = -math.expm1(-x) / x if x > 0 else 1.0
    grown = max(slope, 0.0) * left
    return math.sqrt((level + grown) * (level + grown * lasting))


def slowing(level: float, slopes: tuple[float, float], apart: float, left: float) -> float:
    """Return what ``level`` will have grown to, if its growth goes on slowing down as it did.

    Args:
        level: A norm of V now.
        slopes: Its growth per path time over the last stretch but one, and over the last.
        apart: The length of each stretch.
        left: Path time to go.

    >>> slowing(1.0, (0.5, 0.5), 1.0, 2.0)
    2.0
    >>> slowing(1.0, (0.5, 0.1), 1.0, 2.0) < 1.1
    True
    """
    before, latest = slopes
    if latest <= 0:
        return level
    rate = max(0.0, math.log(before / latest) / apart) if before > 0 else 0.0
    # The slope of the last stretch is that of its middle.
    now = latest * math.exp(-rate * apart / 2)
    return level + now * (-math.expm1(-rate * left) / rate if rate > 0 else left)


class Trend:
    """A norm of V as it has grown so far."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []  # (path time, norm)

    def growth(self, level: float, *, time: float, total: float, pull: float) -> float:
        """Take in the norm now and return the factor by which it will have grown at the end."""
        # Two long stretches are looked back, and the point before them.
        while len(self.points) > 1 and self.points[1][0] <= time - 2 * LONG * total * _JUST:
            del self.points[0]
        self.points.append((time, level))
        left = max(0.0, total - time)
        if level <= 0 or left == 0:
            return 1.0
        apart = LONG * total
        if self.points[0][0] <= time - 2 * apart * _JUST:
            middle, first = self._at(time - apart), self._at(time - 2 * apart)
            slopes = (middle - first) / apart, (level - middle) / apart
            return slowing(level, slopes, apart, left) / level
        since, before = self._before(time - SHORT * total * _JUST)
        slope = (level - before) / (time - since) if time > since else 0.0
        return extrapolated(level, slope, left, pull) / level

    def _before(self, time: float) -> tuple[float, float]:
        """The last point up to ``time``, or the first."""
        earlier = [point for point in self.points if point[0] <= time]
        return earlier[-1] if earlier else self.points[0]

    def _at(self, time: float) -> float:
        """The norm at ``time``, between points by a straight line."""
        for (t0, n0), (t1, n1) in pairwise(self.points):
            if t0 <= time <= t1:
                return n0 + (n1 - n0) * (time - t0) / (t1 - t0) if t1 > t0 else n1
        return self.points[0][1]


_JUST = 1 - 1e-6  # rounding in sums of alpha


class Target:
    """One lambda over some units, and the density it is to give.

    Args:
        name: How messages call it: the pattern of its tensors.
        units: Its units, none of them empty.
        density: The wanted share of their elements.
        floor: Every unit keeps its best block and at least this share of ``density`` of its own
            blocks; None: units may die.

    Raises:
        ValueError: The floor alone takes more than the density allows.
    """

    def __init__(
        self,
        name: str,
        units: Sequence[Sequence[dual.Member]],
        density: float,
        floor: float | None,
    ):
        self.name, self.units, self.density = name, list(units), density
        counts = [math.prod(unit[0].grid) for unit in self.units]
        self.floors = [
            0 if floor is None else max(1, math.floor(floor * density * n * (1 + 1e-12)))
            for n in counts
        ]
        lams = [unit[0].lam for unit in self.units]
        self.weights = [1.0 if math.isinf(lams[0]) else lam / lams[0] for lam in lams]
        sizes = [sum(member.size for member in unit) for unit in self.units]
        self.elements = sum(n * size for n, size in zip(counts, sizes, strict=True))
        # The tiny allowance keeps 0.3 * 10 from falling short of 3.
        self.budget = math.floor(density * self.elements * (1 + 1e-12))
        self._least = sum(k * size for k, size in zip(self.floors, sizes, strict=True))
        if self._least > self.budget:
            raise ValueError(
                f"density={density!r} of {name} is less than its layers' floor, which makes "
                f"{math.ceil(1e4 * self._least / self.elements) / 1e4}: ask for that or more, or "
                f"let layers die with floor=None"
            )
        self.history: list[Record] = []
        self.trend = Trend()
        self.floor_trends = [Trend() for _ in self.units]
        self.lam = math.inf
        self.own: list[float | None] = [None] * len(self.units)
        self.fixed = False
        # For a late lambda: per unit the largest norm ever, and whether a block ever entered.
        self.largest = [0.0] * len(self.units)
        self.entered = [False] * len(self.units)
        self._reached = 0.0

    def blocks(self, norms: Sequence[Tensor]) -> Blocks:
        """Return the blocks with their present norms."""
        return Blocks(self.units, norms, self.weights, self.floors)

    def lam_of(self, index: int) -> float:
        """Return lambda of one unit, in the measure of the target's."""
        own = self.own[index]
        return self.lam if own is None else own

    def pull(self) -> float:
        """Return kappa/nu, averaged over the elements."""
        parts = [
            (m.param.numel(), float(m.group["kappa"]) / float(m.group["nu"]))
            for unit in self.units
            for m in unit
        ]
        return sum(n * share for n, share in parts) / sum(n for n, _ in parts)

    def foresee(self, blocks: Blocks, time: float, total: float) -> tuple[float, float]:
        """Return (q now, the lambda that q will have become at the end)."""
        level = blocks.level(self.budget)
        pool = [
            blocks.level(budget)
            for factor in POOL
            if self._least <= (budget := int(factor * self.budget)) < ALMOST_ALL * self.elements
        ]
        logs = [math.log(norm) for norm in pool or [level]]
        pooled = math.exp(sum(logs) / len(logs))
        growth = self.trend.growth(pooled, time=time, total=total, pull=self.pull())
        return level, level * growth

    def note(self, step: int, time: float, level: float) -> None:
        """Remember what was seen and what lambda is now."""
        self.history.append(Record(step, time, level, self.lam))

    def keep_layers_alive(self, norms: Mapping[int, Tensor], time: float, total: float) -> None:
        """Give units that would end below their floor a lambda of their own.

        Args:
            norms: Of the units that may be given one.
            time: The path time now.
            total: Of the whole run.
        """
        pull = self.pull()
        for i, values in norms.items():
            if not self.floors[i]:
                continue
            blocks = Blocks([self.units[i]], [values], [self.weights[i]], [0])
            level = blocks.own_level(0, self.floors[i])
            trend = self.floor_trends[i]
            wanted = level * trend.growth(level, time=time, total=total, pull=pull)
            if math.isinf(self.lam):
                continue  # nothing is selected yet
            if not self.fixed:
                self.own[i] = wanted if wanted < self.lam else None
            elif wanted < self.lam_of(i):
                # Lambda stands; only a layer that would fall below its floor is still helped.
                self.own[i] = max(_above(self.largest[i]), wanted)

    # A lambda that is chosen late, never below what any block has reached

    def watch(self, norms: Mapping[int, Tensor]) -> None:
        """After a step, take in the norms of the units that no block has entered yet."""
        for i, values in norms.items():
            blocks = Blocks([self.units[i]], [values], [self.weights[i]], [0])
            now = blocks.largest(0)
            if now > self.largest[i]:
                self.largest[i] = now
            if self.fixed and blocks.counts(self.lam_of(i))[0]:
                self.entered[i] = True

    def choose_late(self, blocks: Blocks, step: int, time: float, total: float) -> None:
        """Choose lambda once, at the last moment at which what is wanted is still free to choose.

        Until a block has entered, lambda does not appear in the dynamics: any value that no norm
        has ever exceeded gives the very same run as that value from the start.
        """
        level, wanted = self.foresee(blocks, time, total)
        reached = max(self.largest)
        # By the next look the largest norm will have grown about as much again.
        too_late_next_time = 2 * reached - self._reached >= wanted
        if too_late_next_time or time >= LATEST * total:
            self.lam, self.fixed = max(_above(reached), wanted), True
        self._reached = reached
        self.note(step, time, level)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later decisions depend on, as plain values."""
        return {
            "name": self.name,
            "density": self.density,
            "weights": list(self.weights),
            "history": [list(record) for record in self.history],
            "trend": [list(point) for point in self.trend.points],
            "floor_trends": [[list(point) for point in t.points] for t in self.floor_trends],
            "lam": self.lam,
            "own": list(self.own),
            "fixed": self.fixed,
            "largest": list(self.largest),
            "entered": list(self.entered),
            "reached": self._reached,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken; numbers may have been through JSON."""
        self.weights = [float(weight) for weight in state["weights"]]
        self.history = [
            Record(int(step), float(time), float(level), from_number(lam))
            for step, time, level, lam in state["history"]
        ]
        for trend, points in zip(
            [self.trend, *self.floor_trends],
            [state["trend"], *state["floor_trends"]],
            strict=True,
        ):
            trend.points = [(float(time), float(level)) for time, level in points]
        self.lam = from_number(state["lam"])
        self.own = [None if lam is None else float(lam) for lam in state["own"]]
        self.fixed = bool(state["fixed"])
        self.largest = [float(value) for value in state["largest"]]
        self.entered = [bool(value) for value in state["entered"]]
        self._reached = float(state["reached"])


def _above(largest: float) -> float:
    """A lambda that a norm does not exceed, also after rounding."""
    return largest * (1 + 1e-12)
