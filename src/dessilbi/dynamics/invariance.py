# SPDX-License-Identifier: Apache-2.0
"""Scale invariance: whether a normalisation undoes the size of a tensor's rows.

The loss does not change when the filter in front of a BatchNorm is stretched, so that its gradient
stands at a right angle to it. Such weights do not shrink for good: where coupling and gradient
noise balance, their norm stays. It is read off the gradients, whatever the layers are called.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

NEARLY_ZERO = 0.05  # of what a gradient of random direction would show
_RANDOM = math.sqrt(2 / math.pi)  # the mean of |x| for a standard normal x


@torch.no_grad()
def is_scale_free(params: Iterable[Tensor]) -> bool:
    """Return whether all rows of these tensors stand at right angles to their gradients.

    Args:
        params: Tensors with the gradients that were computed at their present values; of shape
            (rows, ...), as weights of convolutions and linear layers have.

    Returns:
        False also where a tensor has no gradient, or is a vector.

    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    >>> (weight / weight.norm(dim=1, keepdim=True)).pow(3).sum().backward()
    >>> is_scale_free([weight])
    True
    >>> weight.grad += 0.01 * weight
    >>> is_scale_free([weight])
    False
    """
    return all(_angle(param) < NEARLY_ZERO for param in params)


def _angle(param: Tensor) -> float:
    """Mean |cosine| between rows and their gradients; 1: as if the gradient were random."""
    grad = param.grad
    if grad is None or param.dim() < 2 or param.numel() == 0:
        return math.inf
    rows, slopes = param.detach().flatten(1).float(), grad.flatten(1).float()
    sizes = (rows.norm(dim=1) * slopes.norm(dim=1)).sum()
    if not float(sizes):
        return math.inf
    along = (rows * slopes).sum(1).abs().sum()
    return float(along / sizes) * math.sqrt(rows.shape[1]) / _RANDOM
