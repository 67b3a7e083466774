# SPDX-License-Identifier: Apache-2.0
"""Proximal SGD with group lasso: a step of SGD, then the proximal operator on every unit.

M. Yuan and Y. Lin, Model selection and estimation in regression with grouped variables (2006);
the proximal step of N. Parikh and S. Boyd, Proximal algorithms (2014):

    W <- SGD step;   W_g <- max(0, 1 - lr strength sqrt(|g|) / ||W_g||) W_g
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Unit = Sequence[nn.Parameter]  # tensors whose rows at one position form a group


def units_in(groups: Sequence[dict[str, Any]]) -> list[list[nn.Parameter]]:
    """Return the units in groups of ``param_groups`` that cut along dimension 0."""
    found: dict[object, list[nn.Parameter]] = {}
    for number, group in enumerate(groups):
        if group.get("structure") is None:
            continue
        for name, param in group["params"]:
            found.setdefault(group.get("unit") or (number, name), []).append(param)
    return list(found.values())


def norms(unit: Unit) -> Tensor:
    """Return the norm of each group of a unit."""
    rows = len(unit[0])
    squares = [p.detach().reshape(rows, -1).square().sum(1) for p in unit]
    return torch.stack(squares).sum(0).sqrt()


@torch.no_grad()
def shrink_unit(unit: Unit, threshold: float) -> None:
    """Apply the proximal operator of threshold sqrt(|g|) ||W_g|| to a unit."""
    rows = len(unit[0])
    size = sum(p.numel() // rows for p in unit)
    scale = (1 - threshold * size**0.5 / norms(unit).clamp(min=1e-12)).clamp(min=0)
    for p in unit:
        p.mul_(scale.view(-1, *[1] * (p.dim() - 1)))


def proximal_step(optimizer: Optimizer, units: Sequence[Unit], strength: float) -> None:
    """Shrink all units by the learning rate of the step just taken."""
    lr = float(optimizer.param_groups[0]["lr"])
    for unit in units:
        shrink_unit(unit, lr * strength)
