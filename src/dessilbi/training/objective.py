# SPDX-License-Identifier: Apache-2.0
"""Objective: cross-entropy and right answers, for one answer per sample or one per position.

Outputs are logits (N, classes) with targets (N,), or (N, T, classes) with targets (N, T): an
answer for every character of a text. What is counted are answers, ``targets.numel()`` of them.
"""

import torch.nn.functional as F  # noqa: N812 - the name everyone reads at once
from torch import Tensor


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over all answers, in nats.

    Raises:
        ValueError: The shapes do not belong together.
        TypeError: The model's output is no tensor.

    >>> import torch
    >>> round(float(loss_of(torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.int64))), 4)
    1.0986
    """
    _check(outputs, targets)
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def num_correct(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return how many answers are right: a number on the device, so that nothing has to wait."""
    _check(outputs, targets)
    return (outputs.argmax(dim=-1) == targets).sum()


def _check(outputs: Tensor, targets: Tensor) -> None:
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the model returned a {type(outputs).__name__}, not a tensor of logits: "
            f"choose a model with a single output"
        )
    if outputs.shape[:-1] != targets.shape:
        raise ValueError(
            f"outputs of shape {tuple(outputs.shape)} do not answer targets of shape "
            f"{tuple(targets.shape)}: choose another model for this data"
        )
