# SPDX-License-Identifier: Apache-2.0
"""LinBreg and AdaBreg, from the formulas of their paper.

L. Bungert, T. Roith, D. Tenbrinck, M. Burger, A Bregman learning framework for sparse neural
networks (JMLR 2022). With J = lam ||.||_1, the elastic functional J + ||.||^2/(2 delta), and v a
subgradient of it at theta:

    LinBreg   m <- momentum m + (1 - momentum) lr g;   v <- v - m;   theta = delta shrink(v, lam)
    AdaBreg   v <- v - lr m_hat / (sqrt(n_hat) + eps)  (Adam's moments);  theta likewise

The weights themselves are sparse at every step. They start sparse: a share r of the weights is
drawn, scaled by 1/sqrt(r) to keep the variance, and v = theta/delta + lam sign(theta).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def shrink(v: Tensor, lam: float) -> Tensor:
    """Return sign(v) max(|v| - lam, 0).

    >>> shrink(torch.tensor([-2.0, 0.5, 3.0]), 1.0).tolist()
    [-1.0, 0.0, 2.0]
    """
    return v.sign() * (v.abs() - lam).clamp_(min=0)


@torch.no_grad()
def start_sparse(weights: Iterable[Tensor], share: float, seed: int) -> None:
    """Keep a random share of the weights, scaled to the variance that all had."""
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        kept = torch.rand(weight.shape, generator=generator) < share
        weight.mul_(kept / share**0.5)


class Bregman(Optimizer):
    """LinBreg (``betas`` None) or AdaBreg.

    Args:
        params: Parameters or groups; a group's ``lam`` of 0 gives ordinary steps.
        lr: The learning rate.
        lam: Weight of the L1 norm.
        delta: Of the elastic functional.
        momentum: Of LinBreg.
        betas: Of AdaBreg.
        eps: Of AdaBreg.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        lam: float = 0.0,
        delta: float = 1.0,
        momentum: float = 0.9,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
    ):
        defaults = {
            "lr": lr,
            "lam": lam,
            "delta": delta,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, defaults)
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    v = param / group["delta"] + group["lam"] * param.sign()
                    self.state[param] = {"v": v, "count": 0}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move v along the gradient, and the weights to the proximal point of v."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    state["v"] -= _moved(param.grad, state, group)
                    param.copy_(group["delta"] * shrink(state["v"], group["lam"]))
        return loss


def _moved(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Return what v loses in this step."""
    state["count"] += 1
    if group["betas"] is None:
        m = state.setdefault("m", torch.zeros_like(gradient))
        m.mul_(group["momentum"]).add_(gradient, alpha=(1 - group["momentum"]) * group["lr"])
        return m
    first, second = group["betas"]
    m = state.setdefault("m", torch.zeros_like(gradient))
    n = state.setdefault("n", torch.zeros_like(gradient))
    m.mul_(first).add_(gradient, alpha=1 - first)
    n.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    m_hat, n_hat = m / (1 - first ** state["count"]), n / (1 - second ** state["count"])
    return group["lr"] * m_hat / (n_hat.sqrt() + group["eps"])


def bregman_groups(
    model: nn.Module, weights: dict[str, nn.Parameter], lam: float
) -> list[dict[str, Any]]:
    """Return the groups of a network: the given weights sparse, the rest as ever."""
    chosen = set(weights.values())
    others = [p for p in model.parameters() if p not in chosen]
    return [
        {"params": list(chosen & set(model.parameters())), "lam": lam},
        {"params": others, "lam": 0.0},
    ]
