# SPDX-License-Identifier: Apache-2.0
"""Schedules of nu, lambda and kappa: plain functions of progress, beside the learning rate's.

Progress is the share of the path time that is over, in (0, 1].
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer

from dessilbi.dynamics.clock import alpha_now, clock_group
from dessilbi.files.storage import from_number
from dessilbi.optimizers.optimizer import is_phantom_step

Factor = Callable[[float], float]
RAMP = ((0.0, 0.0), (0.3, 1.0))  # of the coupling: linear over the first 30 % of the path time

_WRITERS: WeakKeyDictionary[Optimizer, str] = WeakKeyDictionary()


def claim_lam(optimizer: Optimizer, writer: str) -> None:
    """Note who writes lambda into the groups of an optimizer.

    Raises:
        ValueError: Somebody else does already.
    """
    if optimizer in _WRITERS:
        raise ValueError(
            f"{_WRITERS[optimizer]} writes the lambda of this optimizer already, so {writer} "
            f"cannot: close it first, or say the density of every rule in one DensityControl"
        )
    _WRITERS[optimizer] = writer


def release_lam(optimizer: Optimizer) -> None:
    """Note that nobody writes lambda any more."""
    _WRITERS.pop(optimizer, None)


def piecewise(points: Sequence[Sequence[float]]) -> Factor:
    """Return the function that joins (progress, factor) points by straight lines.

    Before the first point and after the last it is constant; two points at one progress make a
    jump, which the progress itself has already taken.

    Raises:
        ValueError: There is no point, or they are not in ascending order, or a factor is negative.

    >>> ramp = piecewise(RAMP)
    >>> ramp(0.15), ramp(0.9)
    (0.5, 1.0)
    >>> switched_on_late = piecewise([(0.1, 0.0), (0.1, 1.0)])
    >>> switched_on_late(0.09), switched_on_late(0.11)
    (0.0, 1.0)
    """
    known = [(float(at), float(factor)) for at, factor in points]
    places = [at for at, _ in known]
    fine = known and places == sorted(places) and all(0 <= f < math.inf for _, f in known)
    if not fine:
        raise ValueError(
            f"the schedule {list(points)!r} is not allowed: give (progress, factor) points in "
            f"ascending order of progress, with factors >= 0 and finite"
        )

    def factor_at(progress: float) -> float:
        later = [i for i, at in enumerate(places) if at > progress]
        if not later:
            return known[-1][1]
        if later[0] == 0:
            return known[0][1]
        (x0, y0), (x1, y1) = known[later[0] - 1], known[later[0]]
        return y0 + (y1 - y0) * (progress - x0) / (x1 - x0)

    return factor_at


class Schedules:
    """Moves nu, lambda and kappa with the progress of the run, before every step.

    Each function gives the factor on the value that the group started with. The law W + kappa V
    holds under any of them but kappa's, and convergence is only known where all are constant.

    Args:
        optimizer: A DessiLBI (or wrapped) optimizer; watched from now on.
        total_time: T, see :func:`dessilbi.dynamics.clock.total_time`.
        coupling: Of 1/nu; 0 switches the coupling off. ``piecewise(RAMP)`` ramps it up.
        lam: Of lambda, > 0. Not beside DensityControl, which writes lambda itself.
        kappa: Of kappa, > 0.

    Raises:
        ValueError: No group has a structure, nothing is scheduled, or T is not > 0 and finite.

    >>> import torch
    >>> from dessilbi import DessiLBI
    >>> layer = torch.nn.Linear(4, 2)
    >>> optimizer = DessiLBI(layer.named_parameters(), lr=0.1, nu=1.0, structure="layer")
    >>> schedules = Schedules(optimizer, total_time=2.0, coupling=piecewise(RAMP))
    >>> layer(torch.ones(1, 4)).sum().backward()
    >>> optimizer.step()
    >>> round(optimizer.param_groups[0]["nu"], 6)
    6.0
    """

    knows_shapes = True  # compaction leaves it behind with the optimizer it moves

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        total_time: float,
        coupling: Factor | None = None,
        lam: Factor | None = None,
        kappa: Factor | None = None,
    ):
        clock_group(optimizer)
        if not 0 < total_time < math.inf:
            raise ValueError(f"total_time={total_time!r} is not allowed: it must be > 0, finite")
        scheduled = {"nu": coupling, "lam": lam, "kappa": kappa}
        self._functions = {name: f for name, f in scheduled.items() if f is not None}
        if not self._functions:
            raise ValueError("nothing is scheduled: give coupling=, lam= or kappa= a function")
        if lam is not None:
            claim_lam(optimizer, "Schedules")
        self.total_time = total_time
        self.time = 0.0
        self._optimizer = optimizer
        self._bases = [self._base(group) for group in self._groups()]
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def _groups(self) -> list[dict[str, Any]]:
        return [g for g in self._optimizer.param_groups if g.get("structure") is not None]

    def _base(self, group: dict[str, Any]) -> dict[str, float]:
        return {name: float(group[name]) for name in self._functions}

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if is_phantom_step(optimizer):
            return
        # alpha is read while kappa is still that of the last step: wrap's clock depends on it.
        self.time += alpha_now(optimizer)
        self._apply()

    def _apply(self) -> None:
        progress, groups = min(1.0, self.time / self.total_time), self._groups()
        # Groups that have joined start with what they were given.
        self._bases += [self._base(group) for group in groups[len(self._bases) :]]
        for group, base in zip(groups, self._bases, strict=True):
            for name, function in self._functions.items():
                factor = function(progress)
                _check_factor(name, factor, progress)
                if name == "nu":
                    group[name] = base[name] / factor if factor > 0 else math.inf
                else:
                    group[name] = base[name] * factor

    def close(self) -> None:
        """Stop: the options stay as they are."""
        self._handle.remove()
        if "lam" in self._functions:
            release_lam(self._optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedules stand, as plain values."""
        return {"time": self.time, "bases": [dict(base) for base in self._bases]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken; numbers may have been through JSON.

        Raises:
            ValueError: The state is of other groups or schedules.
        """
        bases = [
            {name: from_number(value) for name, value in base.items()} for base in state["bases"]
        ]
        if [set(base) for base in bases] != [set(base) for base in self._bases]:
            raise ValueError(
                "this state of Schedules is of other param groups or options: build the optimizer "
                "and its schedules as they were when the state was saved"
            )
        self.time, self._bases = float(state["time"]), bases
        if self.time > 0:
            self._apply()


def _check_factor(name: str, factor: float, progress: float) -> None:
    """Refuse what no group may hold: a lambda of 0 selects everything, a kappa of 0 nothing."""
    if math.isfinite(factor) and (factor > 0 or (name == "nu" and factor == 0)):
        return
    told = "coupling" if name == "nu" else name
    raise ValueError(
        f"the schedule of {told} gives the factor {factor!r} at progress {progress:.3g}: it must "
        f"be {'>=' if name == 'nu' else '>'} 0 and finite"
    )
