# SPDX-License-Identifier: Apache-2.0
"""Step safety: the Lipschitz constant of the gradient, estimated, and the step it allows."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dessilbi.blocks.sharding import is_sharded
from dessilbi.optimizers import dual


def lipschitz(
    model: nn.Module,
    loss_of: Callable[[Any], Tensor],
    batches: Sequence[Any],
    *,
    iterations: int = 20,
    seed: int = 0,
) -> float:
    """Estimate Lip, the Lipschitz constant of the loss's gradient, around the present weights.

    Power iteration on Hessian-vector products: the largest curvature in magnitude, approached from
    below. It costs ``iterations`` times three backward passes per batch. Weights, gradients and
    buffers (BatchNorm's statistics) are left as they are.

    Args:
        model: The model, in the mode in which it is to be judged; not sharded.
        loss_of: The loss of one batch, with ``model`` inside.
        batches: A few batches; the loss is their mean.
        iterations: At most so many products; fewer if the estimate settles.
        seed: Of the first direction.

    Raises:
        ValueError: There is no batch, no weight to train, or a sharded one.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> inputs = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> round(lipschitz(layer, lambda x: layer(x).square().sum() / 2, [inputs]), 3)
    9.0
    """
    params = [p for p in model.parameters() if p.requires_grad]
    if not params or not batches or iterations < 1:
        raise ValueError(
            f"lipschitz was given {len(params)} weights to train, {len(batches)} batches and "
            f"{iterations} iterations: give at least one of each"
        )
    if any(is_sharded(p) for p in params):
        raise ValueError("lipschitz needs whole weights: estimate it before the model is sharded")
    generator = torch.Generator().manual_seed(seed)
    direction = [
        torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in params
    ]
    estimate = 0.0
    with kept_buffers(model), torch.enable_grad():
        for _ in range(iterations):
            size = _norm(direction)
            if size == 0:
                return 0.0
            direction = [d / size for d in direction]
            products = [_product(loss_of(batch), params, direction) for batch in batches]
            direction = [torch.stack(parts).mean(0) for parts in zip(*products, strict=True)]
            before, estimate = estimate, _norm(direction)
            if abs(estimate - before) <= 1e-4 * estimate:
                break
    return estimate


def _product(loss: Tensor, params: list[nn.Parameter], direction: list[Tensor]) -> list[Tensor]:
    """The Hessian times a direction; weights the loss does not curve in give zeros."""
    grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    along = torch.stack([(g * d).sum() for g, d in zip(grads, direction, strict=True)]).sum()
    if not along.requires_grad:
        return [torch.zeros_like(d) for d in direction]
    found = torch.autograd.grad(along, params, materialize_grads=True)
    return [part.detach() for part in found]


def _norm(parts: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Leave the model's buffers as they were, whatever forward passes do to them."""
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(saved[name])


def largest_step(lipschitz: float, *, nu: float, kappa: float = 1.0) -> float:
    """Return 2/(kappa (Lip + 2/nu)), the alpha under which the descent is proven.

    It holds for the full gradient without momentum; heavy momentum allows more on a quadratic.

    >>> largest_step(2.0, nu=1.0)
    0.5
    """
    curvature = kappa * (lipschitz + 2 / nu)
    return 2 / curvature if curvature > 0 else math.inf


@dataclass(frozen=True)
class StepBound:
    """The step that is used and the step that is proven safe, of the group where they clash most.

    Args:
        alpha: The step of path time.
        bound: 2/(kappa (Lip + 2/nu)).
        lipschitz: Lip as it was given.
    """

    alpha: float
    bound: float
    lipschitz: float

    @property
    def safe(self) -> bool:
        """Whether the step is below the bound."""
        return self.alpha < self.bound

    def __str__(self) -> str:
        verdict = "below" if self.safe else "above"
        return (
            f"alpha = {self.alpha:.3g} is {verdict} 2/(kappa (Lip + 2/nu)) = {self.bound:.3g} "
            f"with Lip = {self.lipschitz:.3g}"
        )


def check_step(optimizer: Optimizer, lipschitz: float) -> StepBound:
    """Compare the present step with the bound of every group, and warn where it is too large.

    Raises:
        ValueError: ``lipschitz`` is not >= 0 and finite.
    """
    if not 0 <= lipschitz < math.inf:
        raise ValueError(f"lipschitz={lipschitz!r} is not allowed: it must be >= 0 and finite")
    found = []
    for group in optimizer.param_groups:
        structured = group.get("structure") is not None
        nu = float(group["nu"]) if structured else math.inf
        bound = largest_step(lipschitz, nu=nu, kappa=float(group["kappa"]))
        found.append(StepBound(float(dual.alpha_of(optimizer, group)), bound, lipschitz))
    worst = max(found, key=lambda step: step.alpha / step.bound)
    if not worst.safe:
        warnings.warn(
            f"{worst}: descent is not proven and the run may diverge; lower lr under the bound, "
            f"or warm it up and watch the loss",
            stacklevel=2,
        )
    return worst
