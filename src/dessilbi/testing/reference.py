# SPDX-License-Identifier: Apache-2.0
"""The dynamics as slow loops over blocks: what an optimizer with a V is compared with.

r = (W - Gamma)/nu;   W moves as the plain optimizer moves it, then   W -= kappa alpha r,
V += alpha r,   Gamma_g = kappa max(0, 1 - lam_g/||V_g||) V_g per block g of each unit
"""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from dessilbi.optimizers.optimizer import DessiLBI
from dessilbi.testing.problem import (
    Factory,
    Named,
    NotApplicable,
    has_dual,
    joint_blocks,
    make,
    norm_and_scale,
    units_of,
)


def make_dual(factory: Factory, dtype: torch.dtype = torch.float64) -> tuple[Named, Optimizer]:
    """Return ``make(factory)``; checks of optimizers without a V do not apply.

    Raises:
        NotApplicable: The optimizer has no structured group.
    """
    named, optimizer = make(factory, dtype=dtype)
    if not has_dual(optimizer):
        raise NotApplicable("the optimizer has no Gamma")
    return named, optimizer


def gammas_of(optimizer: Optimizer, vs: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """Return Gamma of every structured parameter from V, block by block."""
    gammas = {p: torch.zeros_like(v) for p, v in vs.items()}
    for unit in units_of(optimizer):
        for block in joint_blocks(unit):
            group = unit[0][1]
            norm, scale = norm_and_scale([vs[p][at] for p, at in block], group)
            lam = group["lam"] * scale
            if norm <= lam:
                continue
            for p, at in block:
                gammas[p][at] = group["kappa"] * (1 - lam / norm) * vs[p][at]
    return gammas


def group_of(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    """Return the group of every structured parameter."""
    return {p: group for unit in units_of(optimizer) for p, group in unit}


def alpha_of(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """Return the step of path time: lr, or lr/kappa around a base whose lr is the step of W."""
    if isinstance(optimizer, DessiLBI):
        return float(group["lr"])
    step = getattr(optimizer, "path_lr", None)
    return float(group["lr"] if step is None else step) / float(group["kappa"])


class Plain:
    """The optimizer without its coupling, on weights of its own.

    Raises:
        NotApplicable: The optimizer says nothing about what moves its W.
    """

    def __init__(self, named: Named, optimizer: Optimizer):
        self.params = [torch.nn.Parameter(p.detach().clone()) for _, p in named]
        if isinstance(optimizer, DessiLBI):
            self.optimizer: Optimizer = _plain_sgd(named, self.params, optimizer)
        elif isinstance(getattr(optimizer, "base", None), Optimizer):
            # The base on copies of the weights: deepcopy takes our tensors for what is in memo.
            memo = {id(p): own for (_, p), own in zip(named, self.params, strict=True)}
            self.optimizer = copy.deepcopy(optimizer.base, memo)  # type: ignore[attr-defined]
        else:
            raise NotApplicable("the optimizer has no plain form to compare with")

    def step(self, named: Named) -> None:
        """Take a plain step with the gradients of ``named``."""
        for (_, p), own in zip(named, self.params, strict=True):
            own.grad = None if p.grad is None else p.grad.clone()
        self.optimizer.step()


def _plain_sgd(named: Named, params: list[torch.nn.Parameter], optimizer: DessiLBI) -> SGD:
    own: dict[Tensor, torch.nn.Parameter] = {p: q for (_, p), q in zip(named, params, strict=True)}
    shared = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
    return SGD(
        [
            {
                "params": [own[p] for p in group["params"]],
                "lr": group["kappa"] * group["lr"],
                **{option: group[option] for option in shared},
            }
            for group in optimizer.param_groups
        ]
    )


class Reference:
    """W, V and Gamma of an optimizer that has not stepped yet, advanced by slow loops."""

    def __init__(self, named: Named, optimizer: Optimizer):
        self.plain = Plain(named, optimizer)
        own: dict[Tensor, Tensor] = {
            p: q for (_, p), q in zip(named, self.plain.params, strict=True)
        }
        self.optimizer = optimizer
        self.ws = {p: own[p].detach() for p in group_of(optimizer)}
        self.vs = {p: torch.zeros_like(w) for p, w in self.ws.items()}

    @property
    def gammas(self) -> dict[Tensor, Tensor]:
        """Gamma now."""
        return gammas_of(self.optimizer, self.vs)

    def step(self, named: Named) -> None:
        """Advance by one step with the gradients of ``named``."""
        groups, gammas = group_of(self.optimizer), self.gammas
        rs = {p: (w - gammas[p]) / groups[p]["nu"] for p, w in self.ws.items()}
        self.plain.step(named)
        for p, r in rs.items():
            alpha = alpha_of(self.optimizer, groups[p])
            self.vs[p] += alpha * r
            self.ws[p] -= groups[p]["kappa"] * alpha * r
