# SPDX-License-Identifier: Apache-2.0
"""Scales: from values to the length of an axis, and the ticks that are worth a label."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["linear", "log", "error"]

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
SHARES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999)


@dataclass(frozen=True)
class Scale:
    """An axis from ``low`` to ``high``.

    "linear" and "log" are what they are called. "error" is for accuracies near 1: equal lengths are
    equal factors of the error 1 - a, so that 0.98 and 0.99 are as far apart as 0.90 and 0.95.
    """

    low: float
    high: float
    kind: Kind = "linear"

    def place(self, value: float) -> float:
        """Return where a value lies, 0 at ``low`` and 1 at ``high``.

        >>> Scale(1, 100, "log").place(10)
        0.5
        """
        low, high = self._bent(self.low), self._bent(self.high)
        return (self._bent(value) - low) / (high - low)

    def _bent(self, value: float) -> float:
        if self.kind == "log":
            return math.log10(value)
        return -math.log10(1 - value) if self.kind == "error" else value

    def ticks(self, most: int = 6) -> list[float]:
        """Return at most about ``most`` round values within the axis.

        >>> Scale(0, 7).ticks()
        [0.0, 2.0, 4.0, 6.0]
        >>> Scale(0.001, 0.5, "log").ticks()
        [0.001, 0.01, 0.1]
        """
        if self.kind == "error":
            return _apart([s for s in SHARES if self.low <= s <= self.high], self)
        if self.kind == "log":
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            decades = [10.0**k for k in range(first, last + 1)]
            if len(decades) >= 3:
                return decades[:: math.ceil(len(decades) / most)]
            known = [m * 10.0**k for k in range(first - 1, last + 1) for m in (1, 2, 5)]
            return [v for v in known if self.low <= v * (1 + 1e-9) and v <= self.high * (1 + 1e-9)]
        step = _step((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(k * step, 12) + 0.0 for k in range(first, last + 1)]


def _step(least: float) -> float:
    """The smallest round step that is not below ``least``."""
    power = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    return next(s * power for s in STEPS if s * power >= least * (1 - 1e-9))


def _apart(values: list[float], scale: Scale) -> list[float]:
    """Those of ascending values whose labels do not meet."""
    kept: list[float] = []
    for value in values:
        if not kept or scale.place(value) - scale.place(kept[-1]) > 0.08:
            kept.append(value)
    return kept


def around(values: Iterable[float], *, from_zero: bool = False) -> Scale:
    """Return a linear axis that holds finite values, with round ends.

    >>> around([0.3, 9.2], from_zero=True)
    Scale(low=0.0, high=10.0, kind='linear')
    """
    found = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = min(found), max(found)
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - (0 if from_zero else 0.5), high + (abs(high) * 0.1 or 1.0)
    step = _step((high - low) / 5)
    return Scale(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)


def of_accuracy(values: Iterable[float]) -> Scale:
    """Return an axis for accuracies: by the error where they come near 1, else linear."""
    found = [v for v in values if math.isfinite(v)]
    if not found:
        return Scale(0.0, 1.0)
    if not 0.9 <= max(found) < SHARES[-1]:
        return Scale(0.0, 1.0)
    high = next(s for s in SHARES if s > max(found))
    low = max(s for s in SHARES if s <= max(0.0, min(found)))
    return Scale(low, high, "error")


def of_density(values: Iterable[float]) -> Scale:
    """Return an axis for densities: logarithmic where they spread over orders of magnitude.

    Zeros have no place on a logarithmic one.
    """
    found = sorted(v for v in values if v > 0)
    if not found:
        return Scale(0.0, 1.0)
    low, high = found[0], found[-1]
    if high / low <= 10 or found[len(found) // 2] > high / 4:
        return around(found, from_zero=True)
    return Scale(max(low / 1.15, 1e-9), min(1.0, high * 1.15), "log")
