# SPDX-License-Identifier: Apache-2.0
"""The path's clock: how long a run is in path time, and how strongly it couples W to Gamma.

Path time is t = sum of alpha over the steps, T its end. R = kappa T/nu says how often over a weight
without gradient decays by e: the number that decides whether a run makes good tickets.
"""

import copy
import math
import warnings
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dessilbi.optimizers import dual

WEAK_COUPLING = 3.0  # below this R, little is pulled to the support
LARGE_STEP = 0.5  # kappa alpha/nu above this overshoots Gamma
STILL = 0.95  # the path has as good as ended when this share of its time is over


def clock_group(optimizer: Optimizer) -> dict[str, Any]:
    """Return the first group with a structure: its alpha is the path's step of time.

    Raises:
        ValueError: There is none.
    """
    for group in optimizer.param_groups:
        if group.get("structure") is not None:
            return group
    raise ValueError(
        "no param group of this optimizer has a structure, so there is no path: build the groups "
        "with dessilbi.param_groups(model) or pass structure=..."
    )


def alpha_now(optimizer: Optimizer) -> float:
    """Return alpha of the coming step, as the path counts it."""
    return float(dual.alpha_of(optimizer, clock_group(optimizer)))


def alphas(
    optimizer: Optimizer, scheduler: LRScheduler | None, steps: int, *, every: int = 1
) -> list[float]:
    """Return alpha of each of the next ``steps`` steps, without touching optimizer or scheduler.

    Args:
        optimizer: A DessiLBI (or wrapped) optimizer.
        scheduler: What moves its learning rate; None: it is constant.
        steps: How many steps to look ahead.
        every: Optimizer steps per ``scheduler.step()``: 1, or the steps of an epoch.

    Raises:
        ValueError: A number is out of range, or the scheduler follows a metric and cannot be
            known ahead.
        TypeError: ``scheduler`` is not one of torch's.
    """
    for name, value in (("steps", steps), ("every", every)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r} is not allowed: it must be a whole number >= 1")
    if scheduler is None:
        return [alpha_now(optimizer)] * steps
    if isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
        kind = type(scheduler).__name__
        message = (
            f"the path time of a run under {kind} cannot be known ahead: give total_time=..., the "
            f"sum of lr over all steps, or use one of torch's schedulers that follow the step"
        )
        raise (ValueError if isinstance(scheduler, ReduceLROnPlateau) else TypeError)(message)
    stand_in = _stand_in(optimizer)
    # The copy drives the stand-in: neither weights nor the true learning rate are touched.
    ahead = copy.deepcopy(
        scheduler, dict.fromkeys((id(optimizer), id(scheduler.optimizer)), stand_in)
    )
    group = clock_group(stand_in)
    told = getattr(optimizer, "alpha_of", None)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about steps that the stand-in did not take
        for step in range(1, steps + 1):
            found.append(float(group["lr"] if told is None else told(group)))
            if step % every == 0 and step < steps:
                ahead.step()
    return found


def _stand_in(optimizer: Optimizer) -> Optimizer:
    """An optimizer with the same options per group and one number for all parameters."""
    stand_in = SGD([torch.zeros(1)], lr=0.0)
    stand_in.param_groups = [
        {
            key: value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)
            for key, value in group.items()
            if key not in ("params", "param_names")
        }
        | {"params": []}
        for group in optimizer.param_groups
    ]
    stand_in.defaults = dict(optimizer.defaults)
    return stand_in


def total_time(
    optimizer: Optimizer, scheduler: LRScheduler | None = None, *, steps: int, every: int = 1
) -> float:
    """Return T: the path time of the next ``steps`` steps. See :func:`alphas`.

    >>> from dessilbi import DessiLBI
    >>> from torch.optim.lr_scheduler import CosineAnnealingLR
    >>> layer = torch.nn.Linear(4, 2)
    >>> optimizer = DessiLBI(layer.named_parameters(), lr=0.1, structure="layer")
    >>> scheduler = CosineAnnealingLR(optimizer, T_max=100)
    >>> round(total_time(optimizer, scheduler, steps=100), 2), optimizer.param_groups[0]["lr"]
    (5.05, 0.1)
    """
    return PathClock(alphas(optimizer, scheduler, steps, every=every)).total


class PathClock:
    """The path time of a whole schedule, step by step.

    Args:
        steps: alpha of each step, see :func:`alphas`.

    Raises:
        ValueError: Their sum is not > 0 and finite.

    >>> clock = PathClock([0.1] * 30 + [0.01] * 70)
    >>> round(clock.total, 2), round(clock.standing_still, 2)
    (3.7, 0.18)
    """

    def __init__(self, steps: Sequence[float]):
        self._times = list(accumulate(steps))
        self.largest = max(steps, default=0.0)
        if not self._times or not 0 < self._times[-1] < math.inf:
            raise ValueError(
                "the learning rate of this schedule sums to "
                f"{self._times[-1] if self._times else 0}: nothing can enter Gamma; give it a "
                "learning rate > 0"
            )

    @property
    def total(self) -> float:
        """T, the path time of the whole schedule."""
        return self._times[-1]

    @property
    def num_steps(self) -> int:
        """Steps of the whole schedule."""
        return len(self._times)

    @property
    def standing_still(self) -> float:
        """The share of the steps that come after 95 % of the path time is over."""
        moving = bisect_left(self._times, STILL * self.total) + 1
        return max(0.0, 1 - moving / self.num_steps)

    def time_at(self, step: int) -> float:
        """Return the path time after ``step`` steps."""
        return self._times[min(step, self.num_steps) - 1] if step > 0 else 0.0

    def step_at(self, time: float) -> int:
        """Return the first step after which the path time is at least ``time``."""
        return min(bisect_left(self._times, time) + 1, self.num_steps)


def coupling_of(optimizer: Optimizer, total_time: float) -> float:
    """Return R = kappa T/nu, the smallest over the groups with a structure."""
    clock_group(optimizer)
    found = [g for g in optimizer.param_groups if g.get("structure") is not None]
    return min(float(group["kappa"]) * total_time / float(group["nu"]) for group in found)


def set_coupling(
    optimizer: Optimizer,
    coupling: float = 10.0,
    *,
    total_time: float,
    largest_alpha: float | None = None,
) -> float:
    """Set nu = kappa T/R on every group with a structure, and say what is wrong with it, if so.

    Call it before the first step; R = 10 is a good start, 4 careful, 20 for densities under 3 %.

    Args:
        optimizer: A DessiLBI (or wrapped) optimizer.
        coupling: R, > 0.
        total_time: T, see :func:`total_time`.
        largest_alpha: The largest step of the schedule, if it is not the present one.

    Returns:
        nu of the first group with a structure.

    Raises:
        ValueError: A number is out of range.

    >>> from dessilbi import DessiLBI
    >>> layer = torch.nn.Linear(4, 2)
    >>> optimizer = DessiLBI(layer.named_parameters(), lr=0.1, structure="layer")
    >>> set_coupling(optimizer, 10, total_time=50.0)
    5.0
    """
    for name, value in (("coupling", coupling), ("total_time", total_time)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} is not allowed: it must be > 0 and finite")
    first = clock_group(optimizer)
    for group in optimizer.param_groups:
        if group.get("structure") is not None:
            group["nu"] = float(group["kappa"]) * total_time / coupling
    warn_about_coupling(optimizer, total_time, largest_alpha=largest_alpha)
    return float(first["nu"])


def warn_about_coupling(
    optimizer: Optimizer, total_time: float, *, largest_alpha: float | None = None
) -> float:
    """Warn when R is too small to select anything, or so large that one step overshoots Gamma.

    Returns:
        R, the smallest over the groups.
    """
    coupling = coupling_of(optimizer, total_time)
    if coupling < WEAK_COUPLING:
        warnings.warn(
            f"R = kappa T/nu is {coupling:.2g}: under {WEAK_COUPLING:g} the coupling is too weak "
            f"to pull weights to the support; use nu <= {_nu_for(optimizer, total_time, 3):.3g}, "
            f"or {_nu_for(optimizer, total_time, 10):.3g} for R = 10",
            stacklevel=3,
        )
    alpha = alpha_now(optimizer) if largest_alpha is None else largest_alpha
    shares = [
        float(group["kappa"]) * alpha / float(group["nu"])
        for group in optimizer.param_groups
        if group.get("structure") is not None
    ]
    if max(shares) > LARGE_STEP:
        warnings.warn(
            f"kappa alpha/nu is {max(shares):.2g}: above {LARGE_STEP:g} one step pulls W most of "
            f"the way to Gamma and beyond; use a larger nu, a smaller lr or more steps",
            stacklevel=3,
        )
    return coupling


def _nu_for(optimizer: Optimizer, total_time: float, coupling: float) -> float:
    return float(clock_group(optimizer)["kappa"]) * total_time / coupling
