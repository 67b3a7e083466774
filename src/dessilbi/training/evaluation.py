# SPDX-License-Identifier: Apache-2.0
"""Evaluation: accuracy of W, of a ticket (W on its blocks), and of Gamma itself."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn

from dessilbi.blocks.ticket import Ticket
from dessilbi.training.feeding import Split
from dessilbi.training.objective import num_correct

BATCH = 1000
BATCH_ON_CPU = 128  # ResNet-20 takes more than twice as long per image in batches of 500
SAMPLES = 4000  # to re-estimate BatchNorm statistics with
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def accuracy(model: nn.Module, split: Split) -> float:
    """Return the share of right answers, in [0, 1]; the mode is restored."""
    correct, answers = answered(model, split).tolist()
    return float(correct / answers)


@torch.no_grad()
def answered(model: nn.Module, split: Split, *, rank: int = 0, world_size: int = 1) -> Tensor:
    """Return how many answers are right, and how many there are: int64 (2,).

    Args:
        model: The model; its mode is restored.
        split: The samples.
        rank: This process, which looks at its share of the samples only.
        world_size: Number of processes.
    """
    training, device = model.training, _device_of(model)
    model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    size = BATCH_ON_CPU if device.type == "cpu" else BATCH
    for inputs, targets in split.in_order(size, rank=rank, world_size=world_size, device=device):
        counts[0] += num_correct(model(inputs), targets)
        counts[1] += targets.numel()
    model.train(training)
    return counts


def masked(model: nn.Module, ticket: Ticket, train: Split) -> nn.Module:
    """Return a copy of ``model`` with dead blocks at zero, ready to be judged.

    BatchNorm statistics of the copy are re-estimated: those of W do not fit the masked net.
    Nothing is retrained.
    """
    return recalibrated(ticket.apply_(deepcopy(model)), train)


@contextmanager
def changed(
    model: nn.Module, change: Callable[[nn.Module], object], train: Split
) -> Iterator[nn.Module]:
    """Change a model in place for the length of a block, for example to a ticket's weights.

    BatchNorm statistics are re-estimated meanwhile; afterwards every bit is as before. Works on
    models that are shared among processes, where copies do not.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        kept = {name: value.clone() for name, value in own.items()}
        try:
            change(model)
            yield recalibrated(model, train)
        finally:
            for name, value in own.items():
                value.copy_(kept[name])


@torch.no_grad()
def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Replace the named parameters (used to show Gamma)."""
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)


def norms_of(model: nn.Module) -> list[_Norm]:
    """Return the norms whose running statistics depend on the weights before them."""
    return [m for m in model.modules() if isinstance(m, _NORMS) and m.track_running_stats]


@torch.no_grad()
def recalibrated(model: nn.Module, train: Split, *, samples: int = SAMPLES) -> nn.Module:
    """Re-estimate BatchNorm statistics of ``model`` in place, and return it.

    Args:
        model: The model; one without BatchNorm is returned as it is.
        train: Training samples; the first ``samples`` are used, in order.
        samples: How many.
    """
    norms = norms_of(model)
    if not norms:
        return model
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    model.eval()  # dropout stays off
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over all batches
    for inputs, _ in train.in_order(BATCH_ON_CPU, limit=samples, device=_device_of(model)):
        if len(inputs) > 1:  # a batch of one has no deviation
            model(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, mode in modes.items():
        module.training = mode
    return model


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
