# SPDX-License-Identifier: Apache-2.0
"""Magnitude pruning by torch.nn.utils.prune: at once, gradually, and in rounds with rewinding.

Gradual: M. Zhu and S. Gupta, To prune, or not to prune (2017). Rounds: J. Frankle and M. Carbin,
The lottery ticket hypothesis (ICLR 2019).
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy

from benchmarks.evidence.tasks import Task
from benchmarks.evidence.training import Spent, Stage, fit, structured
from torch import nn
from torch.nn.utils import prune
from torch.optim import Optimizer

from dessilbi import Ticket
from dessilbi.blocks.structure import resolve
from dessilbi.blocks.ticket import TensorSpec

Make = Callable[[nn.Module], Optimizer]


def cubic(progress: float, final: float, *, begin: float, end: float) -> float:
    """Return the sparsity of Zhu and Gupta's schedule from 0 to ``final``.

    >>> [round(cubic(p, 0.9, begin=0.0, end=1.0), 4) for p in (0.0, 0.5, 1.0)]
    [0.0, 0.7875, 0.9]
    """
    moved = min(1.0, max(0.0, (progress - begin) / (end - begin)))
    return final * (1 - (1 - moved) ** 3)


def _places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [
        (model.get_submodule(name.removesuffix(".weight")), "weight") for name in structured(model)
    ]


def prune_to(model: nn.Module, density: float) -> None:
    """Prune globally by magnitude until a share of the weights is left; the rest are masked."""
    places = _places(model)
    total = sum(module.weight.numel() for module, _ in places)
    left = sum(
        int(module.weight_mask.sum()) if prune.is_pruned(module) else module.weight.numel()
        for module, _ in places
    )
    amount = left - int(density * total * (1 + 1e-12))
    if amount > 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prune.global_unstructured(places, pruning_method=prune.L1Unstructured, amount=amount)


def mask_ticket(model: nn.Module) -> Ticket:
    """Return the ticket of a pruned network's masks."""
    masks, specs = {}, {}
    for name in {
        f"{n}.weight": None for n, m in model.named_modules() if hasattr(m, "weight_mask")
    }:
        mask = model.get_submodule(name.removesuffix(".weight")).weight_mask.bool()
        masks[name] = mask.contiguous()
        specs[name] = TensorSpec(tuple(mask.shape), resolve("element", tuple(mask.shape)))
    return Ticket(masks, specs, {"kind": "magnitude"})


def made_permanent(model: nn.Module) -> Ticket:
    """Turn masks into zeros, and return them."""
    ticket = mask_ticket(model)
    for module in [m for m in model.modules() if hasattr(m, "weight_mask")]:
        prune.remove(module, "weight")
    return ticket


def by_magnitude(model: nn.Module, density: float) -> Ticket:
    """Return the ticket of the largest weights over all layers."""
    copy = deepcopy(model)
    prune_to(copy, density)
    return made_permanent(copy)


def gradual(
    task: Task,
    model: nn.Module,
    density: float,
    stage: Stage,
    *,
    seed: int,
    make: Make,
    begin: float = 0.1,
    end: float = 0.6,
    every: int = 10,
    start: Ticket | None = None,
) -> tuple[Ticket, Spent]:
    """Train and prune along the cubic schedule; the network ends masked for good.

    Args:
        task: Data and loss.
        model: Trained in place.
        density: Wanted at ``end``.
        stage: Of the schedule.
        seed: Of the order of samples.
        make: From a network to its optimizer.
        begin: Share of the stage at which pruning begins.
        end: ... and ends.
        every: Steps between prunings.
        start: What is left of the network at the beginning; None: all of it.
    """
    if start is not None:
        start.apply_(model)  # what it leaves out is zero, so it goes first
    for module, name in _places(model):
        prune.identity(module, name)
    first = 1.0 if start is None else start.density
    prune_to(model, first)

    def after(step: int) -> None:
        progress = (step + 1 - stage.first) / stage.steps
        if (step + 1) % every == 0 and begin <= progress <= end + every / stage.steps:
            prune_to(model, first - cubic(progress, first - density, begin=begin, end=end))

    spent = fit(task, model, make(model), stage, seed=seed, after=after)
    return made_permanent(model), spent


def rounds(
    task: Task,
    build: Callable[[], nn.Module],
    dense: nn.Module,
    densities: Sequence[float],
    *,
    seed: int,
    make: Make,
) -> Iterator[tuple[float, nn.Module, Ticket, Spent]]:
    """Prune in rounds: magnitude of the last round's weights, rewound to the initialisation.

    Args:
        task: Data and loss.
        build: Returns the network at its initialisation.
        dense: The trained dense network.
        densities: Of the rounds, falling.
        seed: Of the order of samples.
        make: From a network to its optimizer.

    Yields:
        Density, trained network, ticket and what this round cost.
    """
    before = dense
    for density in densities:
        ticket = by_magnitude(before, density)
        net = build()
        ticket.apply_(net)
        optimizer = make(net)
        handle = ticket.enforce(net, optimizer)
        spent = fit(task, net, optimizer, Stage(task.steps), seed=seed)
        handle.remove()
        yield density, net, ticket, spent
        before = net
