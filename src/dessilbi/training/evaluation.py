# SPDX-License-Identifier: Apache-2.0
"""Evaluation: accuracy of W, of a ticket (W on its blocks), and of Gamma itself."""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from dessilbi.ticket import Ticket
from dessilbi.training.data import Split, batches

BATCH = 1000
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Return the share of samples classified correctly, in [0, 1]; the mode is restored."""
    training = model.training
    model.eval()
    correct = 0
    for inputs, targets in batches(split, BATCH, generator=None):
        correct += int((model(inputs).argmax(dim=1) == targets).sum())
    model.train(training)
    return correct / len(split.targets)


def masked(model: nn.Module, ticket: Ticket, train: Split) -> nn.Module:
    """Return a copy of ``model`` with dead blocks at zero, ready to be judged.

    BatchNorm statistics of the copy are re-estimated: those of W do not fit the masked net.
    Nothing is retrained.
    """
    return recalibrated(ticket.apply_(deepcopy(model)), train)


@torch.no_grad()
def with_weights(model: nn.Module, weights: Mapping[str, Tensor], train: Split) -> nn.Module:
    """Return a copy of ``model`` whose named parameters are replaced (used for Gamma)."""
    copy = deepcopy(model)
    parameters = dict(copy.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)
    return recalibrated(copy, train)


@torch.no_grad()
def recalibrated(model: nn.Module, train: Split, *, samples: int = 4000) -> nn.Module:
    """Re-estimate BatchNorm statistics of ``model`` in place, and return it.

    Args:
        model: The model; one without BatchNorm is returned as it is.
        train: Training samples; the first ``samples`` are used, in order.
        samples: How many.
    """
    norms = [m for m in model.modules() if isinstance(m, _NORMS) and m.track_running_stats]
    if not norms:
        return model
    training, momenta = model.training, [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over all batches
    model.train()
    part = Split(train.inputs[:samples], train.targets[:samples])
    for inputs, _ in batches(part, min(500, len(part.targets)), generator=None):
        if len(inputs) > 1:  # a batch of one has no deviation
            model(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(training)
    return model
