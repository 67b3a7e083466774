# SPDX-License-Identifier: Apache-2.0
"""Hints: warning early, and once, about a run in which nothing can enter Gamma."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from dessilbi.optimizers import dual


class EntryHint:
    """Says once, early, that no block can enter Gamma before the schedule ends."""

    def __init__(self) -> None:
        self._pending = True
        self._before: tuple[float, ...] | None = None  # time, share, pull

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen so far, as plain values."""
        return {"pending": self._pending, "before": self._before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was seen before."""
        before = state["before"]
        self._pending = bool(state["pending"])
        # Older states have no pull: what was seen counts for nothing then.
        known = before is not None and len(before) == 3
        self._before = tuple(map(float, before)) if known else None

    def look(self, optimizer: Optimizer, time: float, total: float, *, entered: bool) -> None:
        """Look at the path between a twentieth and a tenth of its time, or once 1/nu stands.

        While the coupling is ramped up V grows faster and faster, and no growth tells the end's.
        """
        if not self._pending or time < 0.05 * total:
            return
        pull = max(1 / float(member.group["nu"]) for member in dual.members(optimizer))
        if self._before is None or (not entered and self._before[2:] != (pull,)):
            self._before = (time, best_share(optimizer), pull)
            return
        start, earlier, _ = self._before
        if time < max(0.1 * total, start + 0.05 * total) * (1 - 1e-9) and not entered:
            return
        self._pending = False
        share = best_share(optimizer)
        rate = (share - earlier) / (time - start) if time > start else 0.0
        lams = {member.lam for member in dual.members(optimizer)}
        if entered or share + rate * (total - time) >= 1 or min(lams) == math.inf:
            return
        if share == 0:
            remedy = "V has not moved at all: check that gradients and learning rate are not zero"
        else:
            # Until the first entry V does not depend on lam: below the present norm a block
            # would have entered by now.
            told = f"lam <= {0.9 * share * min(lams):.2g}" if len(lams) == 1 else "every lam"
            remedy = f"use {told}" if len(lams) == 1 else f"multiply {told} by {0.9 * share:.2g}"
        warnings.warn(
            f"no block can enter Gamma before the schedule ends: the largest ||V|| is "
            f"{share:.2g} of its threshold and grows too slowly; {remedy}",
            stacklevel=2,
        )


def warn_of_joined(names: Sequence[str]) -> None:
    """Warn of tensors that an optimizer got when its path had begun."""
    more = f" and {len(names) - 1} more" if names[1:] else ""
    warnings.warn(
        f"{names[0]}{more} joined the optimizer after this path had begun, and is not part of it "
        f"nor of its tickets: close the path, and go on with Path(optimizer, after=path)",
        stacklevel=2,
    )


@torch.no_grad()
def best_share(optimizer: Optimizer) -> float:
    """The largest ||V||/lam of all blocks."""
    units = [u for u in dual.units_of(dual.members(optimizer)) if u[0].param.numel()]
    shares = [
        float((norms / dual.threshold(unit)).max())
        for unit, norms in zip(units, dual.norms_of(optimizer, units), strict=True)
    ]
    return max(shares, default=0.0)
