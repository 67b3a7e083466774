# SPDX-License-Identifier: Apache-2.0
"""Reading the dual variable V of any optimizer that keeps one: norms, units, Gamma, support.

Works on ``param_groups`` and ``state`` alone, so that DessiLBI, wrapped optimizers and the Path
share it. A *member* is one structured tensor; a *unit* is a set of members whose blocks live or
die together.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from dessilbi.blocks import sharding
from dessilbi.blocks.enforcing import living_entries
from dessilbi.blocks.naming import canonical_names
from dessilbi.blocks.structure import (
    Block,
    block_size,
    grid_shape,
    is_elementwise,
    resolve,
    shrink_scale,
)
from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.kernels import gamma_of

STATE_KEY = "v"
STRETCH = 0.01  # in units of nu/kappa
OWN_LAM = "own_lam"  # in a param group: a lambda for each tensor, where they are not the group's
OWN_LAM_AT = "own_lam_at"  # ... and what the group's was when they were written


def dual_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of V: float32 or wider, because V integrates tiny steps."""
    return torch.promote_types(param.dtype, torch.float32)


def zeros_for(param: Tensor) -> Tensor:
    """Return V as it starts: zeros in its own dtype, laid out as the parameter."""
    return torch.zeros_like(param, dtype=dual_dtype(param), memory_format=torch.preserve_format)


def v_of(optimizer: Optimizer, param: Tensor) -> Tensor | None:
    """Return V of a parameter, or None before its first step.

    A wrapped optimizer may hold a loaded V aside until its base has made a state of its own.
    """
    v: Tensor | None = optimizer.state.get(param, {}).get(STATE_KEY)
    return getattr(optimizer, "_waiting", {}).get(param) if v is None else v


def alpha_of(optimizer: Optimizer, group: dict[str, Any]) -> float | Tensor:
    """Return alpha, the step of path time: lr, or what the optimizer says (wrap: lr/kappa)."""
    told = getattr(optimizer, "alpha_of", None)
    alpha: float | Tensor = group["lr"] if told is None else told(group)
    return alpha


@dataclass(frozen=True, eq=False)
class Member:
    """One structured tensor, with the group that holds its options and its place in the group.

    ``living`` is the number of living entries of every block where a ticket is enforced and they
    matter (block_scale "sqrt"), else None.
    """

    name: str
    param: Tensor
    block: Block
    group: dict[str, Any]
    place: int = 0
    living: Tensor | None = None

    @property
    def lam(self) -> float:
        """Lambda of this tensor: its group's, unless DensityControl gave it one of its own.

        Whoever changes the group's lambda afterwards changes those of its tensors in proportion.
        """
        lam, own = float(self.group["lam"]), self.group.get(OWN_LAM)
        before = float(self.group.get(OWN_LAM_AT, lam))
        if own is None or lam == before:
            return lam if own is None else float(own[self.place])
        return lam if math.isinf(before) else float(own[self.place]) * (lam / before)

    @property
    def grid(self) -> tuple[int, ...]:
        """Blocks along each dimension."""
        return grid_shape(self.block, self.param.shape)

    @property
    def size(self) -> int:
        """Elements per block of this tensor alone."""
        return block_size(self.block, self.param.shape)

    @property
    def spec(self) -> TensorSpec:
        """Shape and block as tickets record them."""
        return TensorSpec(tuple(self.param.shape), self.block)


def members(optimizer: Optimizer) -> list[Member]:
    """Return the structured tensors in the order of the groups.

    Unnamed parameters are called by their place; :func:`named_members` refuses them.
    """
    found = []
    for number, group in enumerate(optimizer.param_groups):
        structure = group.get("structure")
        if structure is None:
            continue
        names = group.get("param_names")
        for i, param in enumerate(group["params"]):
            name = names[i] if names else f"parameter {i} of group {number}"
            block = resolve(structure, param.shape, name=name)
            counted = group.get("block_scale") == "sqrt"
            living = living_entries(optimizer, param, block) if counted else None
            found.append(Member(name, param, block, group, i, living))
    return found


def named_members(optimizer: Optimizer) -> list[Member]:
    """Return the structured tensors under their canonical names.

    Raises:
        ValueError: There is no structured group, or the parameters have no names of their own.
    """
    found = members(optimizer)
    if not found and not any("kappa" in group for group in optimizer.param_groups):
        raise ValueError(
            f"{type(optimizer).__name__} has no Gamma of its own: give it one with "
            f"dessilbi.wrap(optimizer, nu=..., lam=..., structure=...), or use DessiLBI"
        )
    if not found:
        raise ValueError(
            "no param group of this optimizer has a structure, so there is no Gamma: build the "
            "groups with dessilbi.param_groups(model) or pass structure=..."
        )
    if any("param_names" not in member.group for member in found):
        raise ValueError(
            "the parameters of this optimizer have no names: give it model.named_parameters() "
            "or dessilbi.param_groups(model) instead of model.parameters()"
        )
    everything = [name for group in optimizer.param_groups for name in group["param_names"]]
    canonical = dict(zip(everything, canonical_names(everything), strict=True))
    counts = Counter(canonical[member.name] for member in found)
    if counts and counts.most_common(1)[0][1] > 1:
        raise ValueError(
            f"two structured tensors are both called {counts.most_common(1)[0][0]!r}: "
            f"give every parameter a name of its own"
        )
    return [replace(member, name=canonical[member.name]) for member in found]


def units_of(found: Sequence[Member]) -> list[list[Member]]:
    """Return the sets of members that live together: units, and every other member by itself.

    Raises:
        ValueError: Members of a unit differ in their number of blocks, lam or block_scale.
    """
    units: dict[object, list[Member]] = {}
    for member in found:
        name = member.group.get("unit")
        units.setdefault(id(member) if name is None else ("unit", name), []).append(member)
    for key, unit in units.items():
        if isinstance(key, tuple):
            _check_unit(key[1], unit)
    return list(units.values())


def _check_unit(name: object, unit: Sequence[Member]) -> None:
    first = unit[0]
    for member in unit:
        if sum(count > 1 for count in member.grid) > 1:
            raise ValueError(
                f"{member.name} cannot be in unit {name!r}: its blocks form a grid of "
                f"{member.grid}, and a unit needs blocks along one dimension only"
            )
        if prod(member.grid) != prod(first.grid):
            raise ValueError(
                f"unit {name!r} joins {first.name} with {prod(first.grid)} blocks and "
                f"{member.name} with {prod(member.grid)}: members need the same number of blocks"
            )
        for option, one, other in (
            ("lam", first.lam, member.lam),
            ("block_scale", first.group["block_scale"], member.group["block_scale"]),
        ):
            if one != other:
                raise ValueError(
                    f"unit {name!r} joins {first.name} with {option}={one!r} and "
                    f"{member.name} with {option}={other!r}: members need the same {option}"
                )


def threshold(unit: Sequence[Member], lam: float | None = None) -> float | Tensor:
    """Return lam_u, the norm of V above which a block of the unit is selected.

    lam_u = lam ("unit") or lam sqrt(|u|) ("sqrt"), |u| the elements of one block over all members.
    Where a ticket is enforced, only living elements count: then there is one lam_u per block, in
    the grid's shape of the first member (for a block without any, that of one element).
    """
    first = unit[0]
    lam = first.lam if lam is None else lam
    if first.group["block_scale"] != "sqrt":
        return lam
    if all(member.living is None for member in unit):
        return lam * math.sqrt(sum(member.size for member in unit))
    device = sharding.local(first.param).device
    counts: Any = sum(
        member.size if member.living is None else member.living.reshape(-1).to(device)
        for member in unit
    )
    per_block: Tensor = lam * counts.clamp(min=1).sqrt().reshape(first.grid)
    return per_block.to(dual_dtype(first.param))


def norms_of(optimizer: Optimizer, units: Sequence[Sequence[Member]]) -> list[Tensor]:
    """Return ||V_u|| per block for each unit, of the grid's shape of its first member.

    Over all units together this is one all-reduce where parameters are sharded.
    """
    values = [[v_of(optimizer, member.param) for member in unit] for unit in units]
    return joint_norms(
        units,
        [
            [zeros_for(m.param) if v is None else v for m, v in zip(unit, vs, strict=True)]
            for unit, vs in zip(units, values, strict=True)
        ],
    )


def joint_norms(
    units: Sequence[Sequence[Member]], values: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """Return the norm per block of each unit, of any values laid out as the units' parameters.

    Args:
        units: As :func:`units_of` returns them.
        values: For each unit one tensor per member, plain or sharded.
    """
    own = sharding.norms(
        [value for unit in values for value in unit],
        [member.block for unit in units for member in unit],
    )
    norms = iter(own)
    return [_joint([next(norms) for _ in unit], unit[0]) for unit in units]


def growth_of(
    optimizer: Optimizer, units: Sequence[Sequence[Member]], norms: Sequence[Tensor]
) -> list[Tensor]:
    """Return what ||V_u|| grows by per path time, for each unit, while W stays as it is.

    It is that of blocks outside Gamma, <V, W/nu>/||V||: with a Gamma the growth is less.

    Args:
        optimizer: Theirs.
        units: As :func:`units_of` returns them.
        norms: ||V_u|| now, as :func:`norms_of` returns them.
    """
    scales = [min(float(m.group["nu"]) / float(m.group["kappa"]) for m in unit) for unit in units]
    # A short stretch further along the path gives the slope; without a coupling there is none.
    stretches = [STRETCH * scale if scale < math.inf else 1.0 for scale in scales]
    further = joint_norms(
        units,
        [
            [_pushed(optimizer, member, stretch) for member in unit]
            for unit, stretch in zip(units, stretches, strict=True)
        ],
    )
    return [
        (after - now) / stretch
        for after, now, stretch in zip(further, norms, stretches, strict=True)
    ]


def _pushed(optimizer: Optimizer, member: Member, time: float) -> Tensor:
    """V after so much more path time outside Gamma."""
    v = v_of(optimizer, member.param)
    push = member.param.detach().to(dual_dtype(member.param))
    push = push * (time / float(member.group["nu"]))
    return push if v is None else v + push


def _joint(norms: list[Tensor], first: Member) -> Tensor:
    if len(norms) == 1:
        return norms[0]
    wide = max((n.dtype for n in norms), key=lambda dtype: torch.finfo(dtype).bits)
    device = norms[0].device
    joint: Tensor = torch.linalg.vector_norm(
        torch.stack([n.reshape(-1).to(device, wide) for n in norms]), dim=0
    )
    return joint.reshape(first.grid)


class Shrink(NamedTuple):
    """How V of one parameter becomes Gamma on this rank.

    ``scale``: max(0, 1 - lam_u/||V_u||) per block, or None where blocks are independent single
    elements, which are soft-thresholded directly without a second tensor of the size of V.
    ``block``: the block shape of the rank's shard (of the whole tensor where nothing is sharded).
    """

    scale: Tensor | None
    block: Block


def shrinks_of(optimizer: Optimizer, found: Sequence[Member]) -> dict[Tensor, Shrink]:
    """Return how V of every member's parameter becomes Gamma; see :class:`Shrink`."""
    shrinks: dict[Tensor, Shrink] = {}
    coupled = []
    for unit in units_of(found):
        first = unit[0]
        alone = first.group.get("unit") is None and is_elementwise(first.block)
        # Kernels soft-threshold at the group's lambda, so a tensor with its own needs its scales.
        if alone and first.lam == first.group["lam"]:
            shrinks[first.param] = Shrink(None, first.block)
        else:
            coupled.append(unit)
    for unit, norms in zip(coupled, norms_of(optimizer, coupled), strict=True):
        scale = shrink_scale(norms, threshold(unit))
        for member in unit:
            own = scale.reshape(member.grid).to(member.param.device, dual_dtype(member.param))
            shrinks[member.param] = Shrink(*sharding.local_values(own, member.block, member.param))
    return shrinks


def gamma_on_rank(v: Tensor, shrink: Shrink, member: Member) -> Tensor:
    """Return this rank's part of Gamma from its part of V."""
    # lam is looked at where blocks are independent single elements: there it is the threshold.
    kappa, lam = float(member.group["kappa"]), float(member.group["lam"])
    return gamma_of(sharding.local(v), shrink.scale, shrink.block, kappa=kappa, lam=lam)


@torch.no_grad()
def gamma(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return Gamma by canonical name, in the dtype of V, sharded as the parameters are.

    Raises:
        ValueError: As :func:`named_members`.
    """
    found = named_members(optimizer)
    shrinks = shrinks_of(optimizer, found)
    result = {}
    for member in found:
        v = v_of(optimizer, member.param)
        if v is None:
            result[member.name] = zeros_for(member.param)
        else:
            part = gamma_on_rank(v, shrinks[member.param], member)
            result[member.name] = sharding.like(part, v)
    return result


@torch.no_grad()
def support(optimizer: Optimizer) -> Ticket:
    """Return supp(Gamma): the blocks whose ||V|| exceeds their threshold.

    Raises:
        ValueError: As :func:`named_members`.
    """
    found = named_members(optimizer)
    masks: dict[str, Tensor] = {}
    units = units_of(found)
    for unit, norms in zip(units, norms_of(optimizer, units), strict=True):
        alive = norms > threshold(unit)
        for member in unit:
            masks[member.name] = alive.reshape(member.grid)
    specs = {member.name: member.spec for member in found}
    return Ticket({m.name: masks[m.name] for m in found}, specs, {"kind": "support"})
