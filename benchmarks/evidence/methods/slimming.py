# SPDX-License-Identifier: Apache-2.0
"""Network slimming: an L1 penalty on BatchNorm scales, filters ranked by them over all layers.

Z. Liu et al., Learning efficient convolutional networks through network slimming (ICCV 2017).
"""

import torch
from torch import Tensor, nn


def scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the scale of every BatchNorm, by the name of its module."""
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


@torch.no_grad()
def add_penalty(model: nn.Module, strength: float) -> None:
    """Add the subgradient of strength times the L1 norm of the scales to their gradients."""
    for scale in scales(model).values():
        assert scale.grad is not None
        scale.grad.add_(scale.sign(), alpha=strength)


def norms_behind(model: nn.Module) -> dict[str, str]:
    """Return the BatchNorm behind each convolution: the next module in order, by name.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    >>> norms_behind(net)
    {'0': '1'}
    """
    found, last = {}, ""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            last = name
        elif isinstance(module, nn.BatchNorm2d) and last:
            found[last], last = name, ""
    return found


def filter_scores(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Return |scale| for the filters of the named convolutions, shaped (filters, 1, 1, 1).

    Raises:
        KeyError: A convolution has no BatchNorm behind it.
    """
    found, behind = scales(model), norms_behind(model)
    chosen = {name: found[behind[name.removesuffix(".weight")]] for name in names}
    return {n: scale.detach().abs().reshape(-1, 1, 1, 1).clone() for n, scale in chosen.items()}
