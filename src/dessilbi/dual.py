# SPDX-License-Identifier: Apache-2.0
"""Reading the dual variable V of any optimizer that keeps one: norms, units, Gamma, support.

Works on ``param_groups`` and ``state`` alone, so that DessiLBI, wrapped optimizers and the Path
share it. A *member* is one structured tensor; a *unit* is a set of members whose blocks live or
die together.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dessilbi.kernels import gamma_of
from dessilbi.naming import canonical_names
from dessilbi.structure import (
    Block,
    block_norms,
    block_size,
    grid_shape,
    is_elementwise,
    resolve,
    shrink_scale,
)
from dessilbi.ticket import TensorSpec, Ticket

STATE_KEY = "v"


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
    """One structured tensor, with the group that holds its options."""

    name: str
    param: Tensor
    block: Block
    group: dict[str, Any]

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
            found.append(Member(name, param, resolve(structure, param.shape, name=name), group))
    return found


def named_members(optimizer: Optimizer) -> list[Member]:
    """Return the structured tensors under their canonical names.

    Raises:
        ValueError: There is no structured group, or the parameters have no names of their own.
    """
    found = members(optimizer)
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
    return [Member(canonical[m.name], m.param, m.block, m.group) for m in found]


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
        for option in ("lam", "block_scale"):
            if member.group[option] != first.group[option]:
                raise ValueError(
                    f"unit {name!r} joins {first.name} with {option}={first.group[option]!r} and "
                    f"{member.name} with {option}={member.group[option]!r}: "
                    f"members need the same {option}"
                )


def threshold(unit: Sequence[Member], lam: float | None = None) -> float:
    """Return lam_u, the norm of V above which a block of the unit is selected.

    lam_u = lam ("unit") or lam sqrt(|u|) ("sqrt"), |u| the elements of one block over all members.
    """
    group = unit[0].group
    lam = float(group["lam"]) if lam is None else lam
    if group["block_scale"] == "sqrt":
        return lam * math.sqrt(sum(member.size for member in unit))
    return lam


def unit_norms(optimizer: Optimizer, unit: Sequence[Member]) -> Tensor:
    """Return ||V_u|| per block, of the grid's shape of the first member."""
    first = unit[0]
    norms = [_member_norms(optimizer, member) for member in unit]
    if len(norms) == 1:
        return norms[0]
    wide = max((n.dtype for n in norms), key=lambda dtype: torch.finfo(dtype).bits)
    joint: Tensor = torch.linalg.vector_norm(
        torch.stack([n.reshape(-1).to(first.param.device, wide) for n in norms]), dim=0
    )
    return joint.reshape(first.grid)


def _member_norms(optimizer: Optimizer, member: Member) -> Tensor:
    v = v_of(optimizer, member.param)
    if v is None:
        return torch.zeros(member.grid, dtype=dual_dtype(member.param), device=member.param.device)
    return block_norms(v, member.block)


def shrink_scales(optimizer: Optimizer, found: Sequence[Member]) -> dict[Tensor, Tensor | None]:
    """Return max(0, 1 - lam_u/||V_u||) per block for every member's parameter.

    The value is None where blocks are independent single elements: those are soft-thresholded
    directly, without a second tensor of the size of V.
    """
    scales: dict[Tensor, Tensor | None] = {}
    for unit in units_of(found):
        if unit[0].group.get("unit") is None and is_elementwise(unit[0].block):
            scales[unit[0].param] = None
            continue
        scale = shrink_scale(unit_norms(optimizer, unit), threshold(unit))
        for member in unit:
            scales[member.param] = scale.reshape(member.grid).to(
                member.param.device, dual_dtype(member.param)
            )
    return scales


@torch.no_grad()
def gamma(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return Gamma by canonical name, in the dtype of V (float32 or wider).

    Raises:
        ValueError: As :func:`named_members`.
    """
    found = named_members(optimizer)
    scales = shrink_scales(optimizer, found)
    result = {}
    for member in found:
        v = v_of(optimizer, member.param)
        if v is None:
            result[member.name] = torch.zeros_like(member.param, dtype=dual_dtype(member.param))
            continue
        kappa, lam = float(member.group["kappa"]), threshold([member])
        scale = scales[member.param]
        result[member.name] = gamma_of(v, scale, member.block, kappa=kappa, lam=lam)
    return result


@torch.no_grad()
def support(optimizer: Optimizer) -> Ticket:
    """Return supp(Gamma): the blocks whose ||V|| exceeds their threshold.

    Raises:
        ValueError: As :func:`named_members`.
    """
    found = named_members(optimizer)
    masks: dict[str, Tensor] = {}
    for unit in units_of(found):
        alive = unit_norms(optimizer, unit) > threshold(unit)
        for member in unit:
            masks[member.name] = alive.reshape(member.grid)
    specs = {member.name: member.spec for member in found}
    return Ticket({m.name: masks[m.name] for m in found}, specs, {"kind": "support"})
