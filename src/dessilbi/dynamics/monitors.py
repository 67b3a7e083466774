# SPDX-License-Identifier: Apache-2.0
"""Monitors: what the theory speaks about, as numbers to watch along the path."""

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dessilbi.blocks import sharding
from dessilbi.blocks.naming import canonical_names, unwrap
from dessilbi.dynamics.safety import kept_buffers
from dessilbi.optimizers import dual

EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.5, 2.0, math.inf)
FADED = 1e-3  # a unit whose weights are so small beside the layer's largest is as good as dead
MANY_DEAD = 0.5

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@torch.no_grad()
def coupling_gap(optimizer: Optimizer) -> float:
    """Return sum ||W - Gamma||^2 / (2 nu) over the structured tensors: the coupling's energy.

    Raises:
        ValueError: No group has a structure, or the parameters have no names.
    """
    found = dual.named_members(optimizer)
    gammas = dual.gamma(optimizer)
    distances = sharding.norms(
        [m.param.detach().to(dual.dual_dtype(m.param)) - gammas[m.name] for m in found],
        [(None,) * m.param.dim() for m in found],
    )
    return sum(
        float(d.double()) ** 2 / (2 * float(m.group["nu"]))
        for d, m in zip(distances, found, strict=True)
    )


@torch.no_grad()
def norm_histogram(optimizer: Optimizer, edges: Sequence[float] = EDGES) -> dict[str, list[int]]:
    """Return, by name, how many blocks have ||V||/lambda between neighbouring ``edges``.

    A bin holds its upper edge and not its lower one, but for zeros, which are in the first: blocks
    in Gamma are those above the edge 1.

    Raises:
        ValueError: No group has a structure, or the parameters have no names.
    """
    found = dual.named_members(optimizer)
    units = dual.units_of(found)
    counts: dict[str, list[int]] = {}
    for unit, norms in zip(units, dual.norms_of(optimizer, units), strict=True):
        one = dual.threshold(unit)
        # Compared as the step compares them, so that the edge 1 agrees with the support.
        above = [norms.numel()] + [int((norms > edge * one).sum()) for edge in edges[1:-1]] + [0]
        for member in unit:
            counts[member.name] = [a - b for a, b in pairwise(above)]
    return {member.name: counts[member.name] for member in found}


def joint_histogram(optimizer: Optimizer, edges: Sequence[float] = EDGES) -> list[int]:
    """Return :func:`norm_histogram` summed over all tensors, each of a unit by itself."""
    found = norm_histogram(optimizer, edges).values()
    return [sum(counts) for counts in zip(*found, strict=True)]


class Lyapunov:
    """The function that full-batch training brings down: alpha L(W, Gamma) + a Bregman distance.

        F_k = alpha (L(W_k) + ||W_k - Gamma_k||^2/(2 nu)) + Omega(Gamma_k) - <g_{k-1}, Gamma_k>

    with g = V - Gamma/kappa, a subgradient of Omega = sum lambda_u ||Gamma_u||. It does not rise
    with full gradients, no momentum, constant options and a step below :func:`largest_step`.

    Args:
        optimizer: A DessiLBI optimizer with named parameters, not sharded; make this before the
            first step.

    Raises:
        ValueError: A tensor is sharded, alpha differs between groups, or the members of a unit
            differ in kappa.

    >>> from dessilbi import DessiLBI
    >>> layer = nn.Linear(3, 1, bias=False)
    >>> optimizer = DessiLBI(
    ...     layer.named_parameters(), lr=0.1, nu=1.0, lam=0.1, structure="element"
    ... )
    >>> monitor, values = Lyapunov(optimizer), []
    >>> for _ in range(50):
    ...     loss = (layer(torch.eye(3)) - 1).square().sum() / 2
    ...     values.append(monitor.value(loss.item()))
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()
    >>> values == sorted(values, reverse=True)
    True
    """

    def __init__(self, optimizer: Optimizer):
        self._optimizer = optimizer
        self._alpha = self._checked_alpha()
        self._subgradients = self._present_subgradients()

    def _checked_alpha(self) -> float:
        alphas = {float(dual.alpha_of(self._optimizer, g)) for g in self._optimizer.param_groups}
        if len(alphas) > 1:
            raise ValueError(
                f"alpha differs between param groups ({sorted(alphas)}): the Lyapunov function "
                f"needs one step for all"
            )
        found = dual.named_members(self._optimizer)
        if any(sharding.is_sharded(member.param) for member in found):
            raise ValueError("the Lyapunov function is computed on whole tensors, not sharded ones")
        for unit in dual.units_of(found):
            if len({float(member.group["kappa"]) for member in unit}) > 1:
                raise ValueError(
                    f"the members of a unit differ in kappa: {unit[0].name} and others"
                )
        return alphas.pop()

    @torch.no_grad()
    def _present_subgradients(self) -> dict[str, Tensor]:
        gammas = dual.gamma(self._optimizer)
        found = {}
        for member in dual.named_members(self._optimizer):
            v = dual.v_of(self._optimizer, member.param)
            v = dual.zeros_for(member.param) if v is None else v
            found[member.name] = v.double() - gammas[member.name].double() / member.group["kappa"]
        return found

    @torch.no_grad()
    def value(self, loss: float) -> float:
        """Return F now; call it once per step, before it, with the full loss of the present W.

        Raises:
            ValueError: alpha has changed.
        """
        if self._checked_alpha() != self._alpha:
            raise ValueError("alpha has changed: the Lyapunov function needs a constant step")
        units = dual.units_of(dual.named_members(self._optimizer))
        gammas = {n: g.double() for n, g in dual.gamma(self._optimizer).items()}
        norms = dual.joint_norms(units, [[gammas[m.name] for m in unit] for unit in units])
        distance = sum(
            float((dual.threshold(unit) * own).sum())
            for unit, own in zip(units, norms, strict=True)
            if bool(own.any())  # an infinite lambda keeps Gamma at zero
        )
        for name, subgradient in self._subgradients.items():
            distance -= float((subgradient * gammas[name]).sum())
        self._subgradients = self._present_subgradients()
        return self._alpha * (loss + coupling_gap(self._optimizer)) + distance


def dead_units(
    model: nn.Module, loss_of: Callable[[Any], Tensor], batches: Sequence[Any]
) -> dict[str, float]:
    """Return the share of dead units of every convolution and linear layer, by weight.

    A unit (filter, neuron) is dead if no gradient reaches its weights from any of the batches, or
    if they have faded to a thousandth of the layer's largest. Gradients and buffers are left as
    they are. Worth asking after the warm-up: a unit that died before anything was selected is lost.

    Args:
        model: The model, in training mode; DDP and torch.compile are looked through for names.
        loss_of: The loss of one batch, with ``model`` inside.
        batches: A few batches.

    Raises:
        ValueError: There is no batch, or the model has no such layer.

    >>> layer = nn.Linear(2, 4)
    >>> with torch.no_grad():
    ...     _ = layer.bias[:3].fill_(-100.0)  # so that three of four never fire
    >>> dead_units(layer, lambda x: layer(x).relu().sum(), [torch.randn(8, 2)])["weight"] >= 0.75
    True
    """
    layers = _layers(unwrap(model))
    if not layers or not batches:
        raise ValueError(
            f"dead_units was given {len(layers)} layers and {len(batches)} batches: give a model "
            f"with convolutions or linear layers, and at least one batch"
        )
    weights = [weight for weight, _ in layers.values()]
    arrived = [torch.zeros(w.shape[dim], device=w.device) for w, dim in layers.values()]
    with kept_buffers(model), torch.enable_grad():
        for batch in batches:
            grads = torch.autograd.grad(loss_of(batch), weights, materialize_grads=True)
            for total, grad, (_, dim) in zip(arrived, grads, layers.values(), strict=True):
                total += _rows(grad, dim).abs().sum(1)
    found = {}
    for (name, (weight, dim)), total in zip(layers.items(), arrived, strict=True):
        sizes = torch.linalg.vector_norm(_rows(weight.detach(), dim), dim=1)
        dead = (total == 0) | (sizes < FADED * sizes.max())
        found[name] = float(dead.double().mean())
    return found


def _layers(model: nn.Module) -> dict[str, tuple[nn.Parameter, int]]:
    """By canonical name, the weights of convolutions and linear layers, and where units lie."""
    places = {}
    for module in model.modules():
        if isinstance(module, (*_LAYERS, *_TRANSPOSED)):
            places[module.weight] = 1 if isinstance(module, _TRANSPOSED) else 0
    named = dict(model.named_parameters())
    names = canonical_names(list(named))
    return {
        name: (param, places[param])
        for name, param in zip(names, named.values(), strict=True)
        if param in places and param.requires_grad
    }


def _rows(x: Tensor, dim: int) -> Tensor:
    return x.movedim(dim, 0).reshape(x.shape[dim], -1)


def warn_about_dead_units(shares: dict[str, float], *, at_most: float = MANY_DEAD) -> bool:
    """Warn when layers have more dead units than ``at_most``, naming them.

    Args:
        shares: What :func:`dead_units` returned.
        at_most: The share that is still taken in silence.

    Returns:
        Whether it warned.
    """
    bad = {name: share for name, share in shares.items() if share > at_most}
    if bad:
        shown = ", ".join(f"{name} ({share:.0%})" for name, share in list(bad.items())[:6])
        more = f" and {len(bad) - 6} more" if len(bad) > 6 else ""
        warnings.warn(
            f"many units are dead: {shown}{more}; warm the learning rate up, lower it, or ramp the "
            f"coupling up (Schedules with coupling=piecewise(RAMP))",
            stacklevel=2,
        )
    return bool(bad)
