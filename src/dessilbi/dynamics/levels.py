# SPDX-License-Identifier: Apache-2.0
"""Levels: the lambda above which a wanted share of all elements lies, exact to one block."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dessilbi.optimizers import dual

CANDIDATES = 4096  # so few blocks are sorted instead of bisected further
_SMALLEST = sys.float_info.min


@dataclass(frozen=True, eq=False)
class Blocks:
    """All blocks that share one lambda, with the norms of V they have now.

    Args:
        units: The units (see :func:`dessilbi.optimizers.dual.units_of`), none of them empty.
        norms: ||V|| per block of each unit.
        weights: Per unit, what multiplies lambda for it.
        floors: Per unit, how many of its blocks are kept whatever lambda is.
    """

    units: Sequence[Sequence[dual.Member]]
    norms: Sequence[Tensor]
    weights: Sequence[float]
    floors: Sequence[int]

    @property
    def sizes(self) -> list[int]:
        """Elements of one block of each unit, over all of its members."""
        return [sum(member.size for member in unit) for unit in self.units]

    @property
    def elements(self) -> int:
        """Elements of all blocks."""
        return sum(s * n.numel() for s, n in zip(self.sizes, self.norms, strict=True))

    def threshold(self, index: int, lam: float) -> float | Tensor:
        """The norm above which a block of a unit is selected under ``lam``; see dual."""
        return dual.threshold(self.units[index], lam * self.weights[index])

    def counts(self, lam: float) -> list[int]:
        """How many blocks of each unit are selected under ``lam``, floors left aside."""
        found = [(n > self.threshold(i, lam)).sum() for i, n in enumerate(self.norms)]
        return [int(c) for c in torch.stack([c.cpu() for c in found]).tolist()]

    def kept(self, counts: Sequence[int]) -> int:
        """How many elements so many blocks make, floors included."""
        return sum(
            size * max(count, floor)
            for size, count, floor in zip(self.sizes, counts, self.floors, strict=True)
        )

    def largest(self, index: int) -> float:
        """The largest ||V|| of a unit, as the lambda that it just does not exceed."""
        return float((self.norms[index].double() / self.threshold(index, 1.0)).max())

    def level(self, budget: int) -> float:
        """Return the smallest lambda that keeps at most ``budget`` elements, floors included.

        It is the norm of the first block that is left out, so a block more would not fit (but for
        ties). Never 0, which is no lambda.
        """
        low, high = 0.0, max((self.largest(i) for i in range(len(self.units))), default=0.0)
        below, above = self.counts(low), self.counts(high)
        if self.kept(below) <= budget:
            return _SMALLEST
        while sum(below) - sum(above) > CANDIDATES and high - low > 1e-12 * high:
            middle = (low + high) / 2
            counts = self.counts(middle)
            if self.kept(counts) > budget:
                low, below = middle, counts
            else:
                high, above = middle, counts
        return self._among(low, high, budget)

    def _among(self, low: float, high: float, budget: int) -> float:
        """The smallest norm in (low, high] that is a lambda which fits."""
        found = [torch.tensor([high], dtype=torch.float64)]
        for i, norms in enumerate(self.norms):
            inside = (norms > self.threshold(i, low)) & (norms <= self.threshold(i, high))
            one = torch.as_tensor(self.threshold(i, 1.0), dtype=torch.float64)
            found.append((norms.double() / one.to(norms.device))[inside].cpu())
        exact = torch.cat(found)
        # A norm as a lambda may round to just below itself when it is compared; its neighbour
        # does not.
        candidates = sorted({*exact.tolist(), *(exact * (1 + 1e-15)).tolist()})
        first, last = 0, len(candidates) - 1
        while first < last:
            middle = (first + last) // 2
            if self.kept(self.counts(candidates[middle])) <= budget:
                last = middle
            else:
                first = middle + 1
        return max(float(candidates[first]), _SMALLEST)

    def own_level(self, index: int, count: int) -> float:
        """Return the lambda under which the best ``count`` blocks of one unit are selected.

        Blocks whose V is zero cannot be selected, whatever lambda is.
        """
        flat = (self.norms[index].double() / self.threshold(index, 1.0)).reshape(-1)
        best = torch.topk(flat, min(count + 1, flat.numel())).values
        kept = float(best[min(count, flat.numel()) - 1])
        left_out = float(best[-1]) if flat.numel() > count else 0.0
        # In the middle, so that neither falls on the wrong side if it grows a little differently.
        middle = math.sqrt(kept * left_out) if 0 < left_out < kept else kept / 2
        alive = int((self.norms[index] > self.threshold(index, middle)).sum())
        return max(middle if alive == count or left_out == kept else left_out, _SMALLEST)
