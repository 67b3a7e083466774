# SPDX-License-Identifier: Apache-2.0
"""Training: one plain loop for all methods, stages of one schedule, tickets trained on."""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from benchmarks.evidence.tasks import Task, hold
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dessilbi import Path, Ticket
from dessilbi.blocks.structure import resolve
from dessilbi.blocks.ticket import TensorSpec
from dessilbi.choosing.selection import rank
from dessilbi.training.evaluation import recalibrated

MOMENTUM = 0.9
Change = Callable[[int], None]


@dataclass
class Stage:
    """Steps ``first`` to ``first + steps`` of a schedule of ``total`` steps.

    Attributes:
        factor: Of the learning rate, from progress in [0, 1].
    """

    total: int
    first: int = 0
    steps: int = -1
    factor: Callable[[float], float] = hold

    def __post_init__(self) -> None:
        if self.steps < 0:
            self.steps = self.total - self.first

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """Return what moves the learning rate of an optimizer over the stage."""
        return LambdaLR(optimizer, lambda step: self.factor((self.first + step) / self.total))


@dataclass
class Spent:
    """What training came to: multiply-accumulates and seconds of the processor."""

    macs: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.macs + other.macs, self.seconds + other.seconds)


@dataclass
class Searched:
    """The outcome of a search: a network, and how tickets are cut from it.

    Attributes:
        ticket: From a density to a ticket.
        spent: By the search.
        facts: For the table.
        path: Of a DessiLBI search.
    """

    model: nn.Module
    ticket: Callable[[float], Ticket]
    spent: Spent
    facts: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None


def fit(
    task: Task,
    model: nn.Module,
    optimizer: Optimizer,
    stage: Stage,
    *,
    seed: int,
    scheduler: LambdaLR | None = None,
    extra: Callable[[], Tensor] | None = None,
    before: Change | None = None,
    after: Change | None = None,
) -> Spent:
    """Train for a stage.

    Args:
        task: Data and loss.
        model: Trained in place.
        optimizer: What trains it.
        stage: Which part of which schedule.
        seed: Of the order of samples.
        scheduler: Made for the stage already; else it is made here.
        extra: Added to the loss.
        before: Called with the step's number before every step, gradients at hand.
        after: Likewise after every step.
    """
    scheduler = scheduler or stage.scheduler(optimizer)
    began, cost = time.process_time(), 3 * task.macs(model) * task.batch
    model.train()
    batches = task.batches(seed, stage.first, stage.steps)
    for step, (inputs, targets) in enumerate(batches, start=stage.first):
        optimizer.zero_grad()
        loss = task.loss(model, inputs, targets)
        (loss if extra is None else loss + extra()).backward()
        if before is not None:
            before(step)
        optimizer.step()
        scheduler.step()
        if after is not None:
            after(step)
    return Spent(cost * stage.steps, time.process_time() - began)


def structured(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of convolutions and linear layers, by name."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def ticket_by(scores: dict[str, Tensor], density: float, floor: float = 0.0) -> Ticket:
    """Return the ticket of the single weights with the largest scores, over all layers."""
    specs = {n: TensorSpec(tuple(s.shape), resolve("element", s.shape)) for n, s in scores.items()}
    units = dict.fromkeys(specs)
    return rank([scores], specs, units, floor=floor).ticket(density, {"kind": "score"})


def sgd(model: nn.Module, lr: float, **options: Any) -> SGD:
    """Return SGD with the momentum of all methods."""
    return SGD(model.parameters(), lr=lr, momentum=MOMENTUM, **options)


def train_ticket(
    task: Task,
    model: nn.Module,
    ticket: Ticket,
    stage: Stage,
    *,
    seed: int,
    optimizer: Callable[[nn.Module], Optimizer],
) -> tuple[nn.Module, Spent]:
    """Return a copy of the network trained on under the ticket, and what it cost."""
    net = deepcopy(model)
    ticket.apply_(net)
    made = optimizer(net)
    handle = ticket.enforce(net, made)
    spent = fit(task, net, made, stage, seed=seed)
    handle.remove()
    return net, spent


def judged(task: Task, model: nn.Module, *, reported: bool) -> dict[str, float]:
    """Return scores on the validation part and, for what is reported, the test part."""
    found = {f"val_{key}": value for key, value in task.judge(model, task.validation).items()}
    if reported:
        found |= {f"test_{key}": value for key, value in task.judge(model, task.test).items()}
    return found


def at_once(task: Task, model: nn.Module, ticket: Ticket, *, reported: bool) -> dict[str, float]:
    """Return the scores right after extraction, BatchNorm statistics estimated anew."""
    net = recalibrated(ticket.apply_(deepcopy(model)), task.train)
    return {f"once_{key}": value for key, value in judged(task, net, reported=reported).items()}


def quick() -> None:
    """Set torch up for short steps on one thread of a CPU."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # masked momentum decays into denormals
