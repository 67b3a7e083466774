# SPDX-License-Identifier: Apache-2.0
"""Plain optimizers, as torch has them, and the L1 subgradient."""

from collections.abc import Callable
from typing import Any

import torch
from benchmarks.evidence.training import MOMENTUM, structured
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

Make = Callable[[nn.Module, float, float], Optimizer]
SMALL_DECAY = 5e-4

# name -> (network, learning rate, value of its own parameter) -> optimizer
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda net, lr, _: SGD(net.parameters(), lr=lr, momentum=MOMENTUM),
    "nesterov": lambda net, lr, _: SGD(net.parameters(), lr=lr, momentum=MOMENTUM, nesterov=True),
    "sgd-decay": lambda net, lr, own: SGD(
        net.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=own
    ),
    "sgd-l1": lambda net, lr, _: SGD(net.parameters(), lr=lr, momentum=MOMENTUM),
    "adagrad": lambda net, lr, _: Adagrad(net.parameters(), lr=lr),
    "rmsprop": lambda net, lr, _: RMSprop(net.parameters(), lr=lr),
    "adam": lambda net, lr, _: Adam(net.parameters(), lr=lr),
    "adamw": lambda net, lr, own: AdamW(net.parameters(), lr=lr, weight_decay=own),
}


@torch.no_grad()
def add_l1(model: nn.Module, strength: float) -> None:
    """Add the subgradient of strength times the L1 norm to the gradients of the weights."""
    for weight in structured(model).values():
        assert weight.grad is not None
        weight.grad.add_(weight.sign(), alpha=strength)


def changes(name: str, model: nn.Module, own: float) -> dict[str, Any]:
    """Return what to call in the loop besides the optimizer."""
    return {"before": lambda _: add_l1(model, own)} if name == "sgd-l1" else {}
