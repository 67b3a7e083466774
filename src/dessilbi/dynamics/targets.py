# SPDX-License-Identifier: Apache-2.0
"""Targets: a density that is wanted of some blocks, and the lambda that will give it.

The lambda of a density is a norm of V: that which the wanted share of blocks exceeds. What the
norms will have become at the end is foreseen from how they grow now (docs/density.md).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from dessilbi.dynamics.forecast import extrapolated
from dessilbi.dynamics.invariance import is_scale_free
from dessilbi.dynamics.levels import Blocks
from dessilbi.files.storage import from_number
from dessilbi.optimizers import dual

MIDDLE = 0.5  # of the path: from here on the slowing down is measured
RECENT = 0.1  # ... over this share of the path time
LASTING = 0.7  # ... and taken to go on at this share of its rate
BAND = (0.5, 4.0)  # times the wanted density: the blocks whose growth tells how fast it slows down
ALMOST_ALL = 0.95
LATEST = 0.5  # a late lambda is chosen by this share of the path time
_JUST = 1 - 1e-6  # rounding in sums of alpha


class Record(NamedTuple):
    """What a target saw and said: ``level`` is q now, ``lam`` what was set (inf: nothing yet)."""

    step: int
    time: float
    level: float
    lam: float


def slowing(points: Sequence[tuple[float, float]]) -> float:
    """Return the rate at which a growth decays: minus the slope of its logarithm, at least 0.

    Args:
        points: (path time, growth); a least-squares line is drawn through them.

    >>> round(slowing([(0.0, 4.0), (1.0, 2.0), (2.0, 1.0)]), 3)
    0.693
    >>> slowing([(0.0, 1.0), (1.0, 2.0)])
    0.0
    """
    known = [(time, math.log(growth)) for time, growth in points if growth > 0]
    middle = sum(time for time, _ in known) / max(1, len(known))
    spread = sum((time - middle) ** 2 for time, _ in known)
    if spread == 0:
        return 0.0
    slope = sum((time - middle) * log for time, log in known) / spread
    return max(0.0, -slope)


def reach(rate: float, left: float) -> float:
    """Return for how much path time a growth of today counts if it decays at ``rate``.

    >>> reach(0.0, 2.0), round(reach(1.0, 2.0), 3)
    (2.0, 0.865)
    """
    return -math.expm1(-rate * left) / rate if rate * left > 1e-9 else left


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
                f'let layers die with floor=None (in a recipe: floor = "none")'
            )
        self.history: list[Record] = []
        self.trend: list[tuple[float, float]] = []  # (path time, growth in the band)
        self.lam = math.inf
        self.own: list[float | None] = [None] * len(self.units)
        self.fixed = False
        # Per unit, whether its weights keep their size, since a normalisation undoes it.
        self.steady = [False] * len(self.units)
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

    def expect(
        self, blocks: Blocks, growths: Sequence[Tensor], time: float, total: float
    ) -> list[Tensor]:
        """Return what ||V|| of each block will have become at the end.

        Args:
            blocks: All blocks, with their norms now.
            growths: Of the norms, see :func:`dessilbi.optimizers.dual.growth_of`.
            time: The path time now.
            total: Of the whole run.
        """
        left, pull = total - time, self.pull()
        now, slopes = list(blocks.norms), list(growths)
        if math.isfinite(self.lam):  # Gamma holds W back
            slopes = [
                slope - pull * (norms - blocks.threshold(i, self.lam_of(i))).clamp(min=0)
                for i, (slope, norms) in enumerate(zip(growths, now, strict=True))
            ]
        self._follow(blocks, slopes, time, total)
        if left <= total * (1 - _JUST):
            return now
        if time < MIDDLE * total * _JUST:
            ahead = torch.tensor(left, dtype=torch.float64)
            return [
                extrapolated(n, s, ahead.to(n.device), pull)
                for n, s in zip(now, slopes, strict=True)
            ]
        counts = reach(LASTING * slowing(self.trend), left)
        return [
            (n + s * (left if steady else counts)).clamp(min=0)
            for n, s, steady in zip(now, slopes, self.steady, strict=True)
        ]

    def _follow(self, blocks: Blocks, slopes: Sequence[Tensor], time: float, total: float) -> None:
        """Take in how fast the blocks around the wanted share grow, of those that slow down."""
        low, high = (
            blocks.level(
                max(self._least, min(int(f * self.budget), int(ALMOST_ALL * self.elements)))
            )
            for f in reversed(BAND)
        )
        found = [torch.empty(0)]
        for i, (norms, slope) in enumerate(zip(blocks.norms, slopes, strict=True)):
            if self.steady[i]:
                continue
            near = (norms >= blocks.threshold(i, low)) & (norms <= blocks.threshold(i, high))
            found.append((slope / blocks.threshold(i, 1.0))[near].cpu())
        flat = torch.cat(found)
        if flat.numel():
            self.trend.append((time, float(flat.mean())))
        while self.trend and self.trend[0][0] < time - RECENT * total / _JUST:
            del self.trend[0]

    def watch_gradients(self) -> None:
        """Before a step, find the units that are scale-free."""
        self.steady = [is_scale_free(m.param for m in unit) for unit in self.units]

    def foresee(self, blocks: Blocks, expected: Sequence[Tensor]) -> tuple[float, float]:
        """Return (q now, the lambda that q will have become at the end)."""
        return blocks.level(self.budget), self.blocks(expected).level(self.budget)

    def note(self, step: int, time: float, level: float) -> None:
        """Remember what was seen and what lambda is now."""
        self.history.append(Record(step, time, level, self.lam))

    def keep_layers_alive(self, norms: Mapping[int, Tensor], expected: Sequence[Tensor]) -> None:
        """Give units that would end below their floor a lambda of their own.

        Args:
            norms: Of the units that may be given one, now.
            expected: Of all units, what is expected of them at the end.
        """
        if math.isinf(self.lam):
            return  # nothing is selected yet
        for i, values in norms.items():
            if not self.floors[i]:
                continue
            at_end = Blocks([self.units[i]], [expected[i]], [self.weights[i]], [0])
            wanted = at_end.own_level(0, self.floors[i])
            if not self.fixed:
                self.own[i] = wanted if wanted < self.lam else None
                continue
            # Lambda stands; only a layer that is below its floor is still helped.
            now = Blocks([self.units[i]], [values], [self.weights[i]], [0])
            if wanted < self.lam_of(i) and now.counts(self.lam_of(i))[0] < self.floors[i]:
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

    def choose_late(
        self, blocks: Blocks, expected: Sequence[Tensor], step: int, time: float, total: float
    ) -> None:
        """Choose lambda once, at the last moment at which what is wanted is still free to choose.

        Until a block has entered, lambda does not appear in the dynamics: any value that no norm
        has ever exceeded gives the very same run as that value from the start.
        """
        level, wanted = self.foresee(blocks, expected)
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
            "trend": [list(point) for point in self.trend],
            "lam": self.lam,
            "own": list(self.own),
            "fixed": self.fixed,
            "steady": list(self.steady),
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
        self.trend = [(float(time), float(growth)) for time, growth in state["trend"]]
        self.lam = from_number(state["lam"])
        self.own = [None if lam is None else float(lam) for lam in state["own"]]
        self.fixed = bool(state["fixed"])
        self.steady = [bool(steady) for steady in state["steady"]]
        self.largest = [float(value) for value in state["largest"]]
        self.entered = [bool(value) for value in state["entered"]]
        self._reached = float(state["reached"])


def _above(largest: float) -> float:
    """A lambda that a norm does not exceed, also after rounding."""
    return largest * (1 + 1e-12)


def controlled(optimizer: Optimizer, *, named: bool = False) -> list[Sequence[dual.Member]]:
    """Return the units of an optimizer that have blocks, in order."""
    found = dual.named_members(optimizer) if named else dual.members(optimizer)
    return [unit for unit in dual.units_of(found) if math.prod(unit[0].grid)]


def targets_of(
    optimizer: Optimizer, density: float | Mapping[str, float], floor: float | None
) -> tuple[list[Target], list[list[int]]]:
    """Return a target for each pattern that was given a density, and the places of its units.

    Args:
        optimizer: A DessiLBI (or wrapped) optimizer.
        density: As in :class:`dessilbi.DensityControl`.
        floor: As in :class:`dessilbi.DensityControl`.

    Returns:
        The targets, and for each the places of its units in :func:`controlled`.

    Raises:
        ValueError: No group has a structure, a pattern fits nothing, or members of one unit come
            under different patterns.
    """
    wanted = density if isinstance(density, Mapping) else {"*": density}
    units = controlled(optimizer, named=isinstance(density, Mapping))
    if not units:
        dual.named_members(optimizer)  # says why there is nothing to control
        raise ValueError("the structured tensors of this optimizer have no elements")
    chosen: dict[str, list[int]] = {pattern: [] for pattern in wanted}
    for place, unit in enumerate(units):
        rules = {_first_match(member.name, wanted) for member in unit}
        if len(rules) > 1:
            names = ", ".join(member.name for member in unit)
            raise ValueError(
                f"{names} live in one unit but come under different patterns of density: "
                f"write one pattern that matches them all"
            )
        if (rule := rules.pop()) is not None:
            chosen[rule].append(place)
    for pattern, places in chosen.items():
        if not places:
            names = ", ".join(member.name for unit in units[:6] for member in unit)
            raise ValueError(
                f"the pattern {pattern!r} of density decides for no structured tensor: "
                f"those are {names}"
            )
    targets = [
        Target(pattern, [units[place] for place in places], wanted[pattern], floor)
        for pattern, places in chosen.items()
    ]
    for target in targets:
        _check_lams(target)
    return targets, list(chosen.values())


def _check_lams(target: Target) -> None:
    infinite = [math.isinf(unit[0].lam) for unit in target.units]
    if any(infinite) and not all(infinite):
        raise ValueError(
            f"lam is infinite for some tensors of {target.name} and not for others: give them all "
            f"a finite one (their ratios are kept), or none"
        )


def _first_match(name: str, patterns: Iterable[str]) -> str | None:
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)
