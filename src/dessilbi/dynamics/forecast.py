# SPDX-License-Identifier: Apache-2.0
"""Forecast: when the blocks that are still outside Gamma will enter, if they ever do.

While a block is outside, V grows by W/nu per path time. Between a weight that stays as it is and
one that the coupling alone moves lies the same middle that DensityControl uses.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from dessilbi.dynamics.clock import PathClock
from dessilbi.optimizers import dual

HORIZON = 100.0  # in units of nu/kappa; beyond it a prediction means nothing
STILL_SHARE = 1 / 3  # a path that stands still for so much of the steps is worth a word
HALVINGS = 40


@torch.no_grad()
def entry_times(
    optimizer: Optimizer,
    *,
    time: float = 0.0,
    entered: Mapping[str, Tensor] | None = None,
    past: tuple[Sequence[int], Sequence[float]] = ((), ()),
) -> dict[str, Tensor]:
    """Return the path time at which each block is expected to be in Gamma, by name.

    Args:
        optimizer: A DessiLBI (or wrapped) optimizer with named parameters.
        time: The path time now.
        entered: The step of first entry of each block, negative: none; see Path.
        past: Steps, ascending, and the path time of each, and of what comes after the last.

    Returns:
        Tensors of the grids' shapes, float64, on the CPU: of blocks that have entered the time of
        that (``time`` where only Gamma tells), ``inf`` for those not expected to.

    Raises:
        ValueError: No group has a structure, or the parameters have no names.

    >>> from dessilbi import DessiLBI
    >>> layer = torch.nn.Linear(4, 1, bias=False)
    >>> _ = layer.weight.detach().copy_(torch.tensor([[1.0, 0.5, 0.1, 0.0]]))
    >>> optimizer = DessiLBI(layer.named_parameters(), nu=10.0, lam=0.1, structure="element")
    >>> entry_times(optimizer)["weight"].round(decimals=2)
    tensor([[ 1.0100,  2.0500, 11.4600,     inf]], dtype=torch.float64)
    """
    found = dual.named_members(optimizer)
    times: dict[str, Tensor] = {}
    for unit in _outlook(optimizer, found):
        for member in unit.members:
            times[member.name] = (time + unit.time_to_enter()).reshape(member.grid)
    steps, known = torch.tensor(past[0]), torch.tensor(past[1], dtype=torch.float64)
    for name, entry in (entered or {}).items():
        # The first kept point at or after the entry: points in between may be thinned away.
        place = torch.searchsorted(steps, entry.clamp(min=0))
        times[name] = torch.where(entry < 0, times[name], known[place])
    return {name: times[name] for name in entered or [member.name for member in found]}


def extrapolated(norms: Tensor, growth: Tensor, left: Tensor, pull: float) -> Tensor:
    """Return what norms of V will have grown to after ``left`` more of path time.

    With n the norm, g its growth, H the time left and x = pull H/2 this is
    sqrt( (n + g H) (n + g H (1 - exp(-x))/x) ): the middle between weights that stay as they are
    and weights that the coupling alone lets decay.

    Args:
        norms: ||V|| per block now.
        growth: Per path time, see :func:`dessilbi.optimizers.dual.growth_of`; of blocks that
            shrink it is 0.
        left: Path time to go, one number or one per block.
        pull: kappa/nu.

    >>> one = torch.ones(())
    >>> round(float(extrapolated(one, one / 2, 2 * one, 1.0)), 3)
    1.807
    """
    x = left * pull / 2
    lasting = torch.where(x > 0, -torch.expm1(-x) / x.clamp(min=1e-300), 1.0)
    grown = growth.clamp(min=0.0) * left
    return ((norms + grown) * (norms + grown * lasting)).sqrt()


@dataclass(frozen=True, eq=False)
class _Outlook:
    """A unit's norms of V, what they grow by per path time, and nu/kappa."""

    members: Sequence[dual.Member]
    norms: Tensor
    growth: Tensor
    scale: float

    def norms_after(self, left: Tensor) -> Tensor:
        """The norms after ``left`` more path time."""
        return extrapolated(self.norms, self.growth, left, 1 / self.scale)

    def time_to_enter(self) -> Tensor:
        """Path time until the norms pass their threshold, by bisection; inf: never."""
        lam = dual.threshold(self.members)
        late = torch.full_like(self.norms, HORIZON * self.scale)
        early = torch.zeros_like(self.norms)
        never = ~(self.norms_after(late) > lam)
        for _ in range(HALVINGS):
            middle = (early + late) / 2
            there = self.norms_after(middle) > lam
            late, early = torch.where(there, middle, late), torch.where(there, early, middle)
        return late.masked_fill(never, math.inf).masked_fill(self.norms > lam, 0.0)


def _outlook(optimizer: Optimizer, found: Sequence[dual.Member]) -> list[_Outlook]:
    units = dual.units_of(found)
    scales = [min(float(m.group["nu"]) / float(m.group["kappa"]) for m in u) for u in units]
    now = dual.norms_of(optimizer, units)
    growths = dual.growth_of(optimizer, units, now)
    return [
        _Outlook(unit, n.cpu().double(), growth.cpu().double(), scale)
        for unit, n, growth, scale in zip(units, now, growths, scales, strict=True)
    ]


@dataclass(frozen=True)
class Forecast:
    """What is left to happen on the path.

    Args:
        first: Path time of the first expected entry; ``inf`` if none is expected.
        blocks: Share of all blocks that are in Gamma or expected to enter before the end.
        elements: The same as a share of elements: the density that may be reached.
        at_constant_rate: ``blocks``, if the learning rate stayed at its largest to the last step.
        standing_still: Share of the steps that come after 95 % of the path time is over.
    """

    first: float
    blocks: float
    elements: float
    at_constant_rate: float
    standing_still: float


@torch.no_grad()
def forecast(optimizer: Optimizer, clock: PathClock, *, step: int = 0) -> Forecast:
    """Return what can be expected of the rest of the schedule, from W and V as they are.

    Before training it speaks for the initial weights, and a weight that learns grows faster.

    Raises:
        ValueError: No group has a structure, or the parameters have no names.
    """
    found = dual.named_members(optimizer)
    now = clock.time_at(step)
    held = now + (clock.num_steps - step) * clock.largest
    times = entry_times(optimizer, time=now)
    flat = torch.cat([times[m.name].reshape(-1) for m in found])
    if not flat.numel():
        return Forecast(math.inf, 0.0, 0.0, 0.0, clock.standing_still)
    sizes = torch.cat([torch.full((times[m.name].numel(),), float(m.size)) for m in found])
    enters = flat <= clock.total
    return Forecast(
        first=float(flat.min()),
        blocks=float(enters.double().mean()),
        elements=float(sizes[enters].sum() / sizes.sum()),
        at_constant_rate=float((flat <= held).double().mean()),
        standing_still=clock.standing_still,
    )


def warn_if_frozen(optimizer: Optimizer, clock: PathClock, *, step: int) -> bool:
    """Warn when the learning rate decays before most of the blocks that could enter have.

    Worth asking after about a tenth of the path time.

    Returns:
        Whether it warned.

    Raises:
        ValueError: No group has a structure, or the parameters have no names.
    """
    seen = forecast(optimizer, clock, step=step)
    if clock.standing_still < STILL_SHARE or seen.blocks >= seen.at_constant_rate / 2:
        return False
    left = torch.tensor(clock.total - clock.time_at(step), dtype=torch.float64)
    shares = [
        (unit.norms_after(left) / dual.threshold(unit.members)).reshape(-1)
        for unit in _outlook(optimizer, dual.named_members(optimizer))
    ]
    flat = torch.cat(shares).sort(descending=True).values
    share = float(flat[int(seen.at_constant_rate / 2 * len(flat))])
    lams = {member.lam for member in dual.members(optimizer)}
    nus = {float(member.group["nu"]) for member in dual.members(optimizer)}
    lam = f"lam = {share * min(lams):.2g}" if len(lams) == 1 else f"every lam times {share:.2g}"
    nu = f"nu = {share * min(nus):.3g}" if len(nus) == 1 else f"every nu times {share:.2g}"
    warnings.warn(
        f"the learning rate decays before most blocks can enter Gamma: the path stands still for "
        f"the last {seen.standing_still:.0%} of the steps, {seen.blocks:.1%} of the blocks are "
        f"expected to enter, {seen.at_constant_rate:.1%} would at a constant rate; hold the "
        f"learning rate longer, or use {nu} or {lam}",
        stacklevel=2,
    )
    return True
