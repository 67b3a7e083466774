# SPDX-License-Identifier: Apache-2.0
"""Random closed tickets, to test everything that comes after training without training."""

import numpy as np
import torch
from torch import nn

from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.cuts.closing import close_on
from dessilbi.graph import read_graph
from dessilbi.graph.program import ExampleInputs


def random_ticket(
    model: nn.Module, *, example_inputs: ExampleInputs, density: float, seed: int = 0
) -> Ticket:
    """Return a closed ticket in which whole units die together, chosen at random.

    Args:
        model: The model; it is not changed.
        example_inputs: A tensor, a tuple of forward's arguments, or a dict of its keywords.
        density: Share of removable blocks kept in each unit (at least one), in (0, 1].
        seed: Of the random choice; evenly per group around grouped convolutions.

    Raises:
        ValueError: The density is not in (0, 1], or nothing in the model is removable.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> ticket = random_ticket(net, example_inputs=torch.ones(1, 4), density=0.5)
    >>> int(ticket["0.weight"].sum())
    4
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}: give a number above 0 and at most 1")
    graph = read_graph(model, example_inputs)
    if not graph.units:
        told = "; ".join(f"{name}: {why}" for name, why in list(graph.left_out.items())[:3])
        raise ValueError(f"nothing in {type(model).__name__} can be removed ({told})")
    generator = torch.Generator().manual_seed(seed)
    alive = np.zeros(graph.num_blocks, bool)
    for unit in graph.units:
        for group in graph.even_groups(unit):
            count = max(1, round(density * len(group)))
            order = torch.randperm(len(group), generator=generator).numpy()
            alive[unit.blocks[group[order[:count]]]] = True
    masks: dict[str, torch.Tensor] = {}
    specs: dict[str, TensorSpec] = {}
    written = {(m.name, m.dim) for unit in graph.units for m in unit.producers}
    for unit in graph.units:
        for member in unit.producers:
            shape = graph.shapes[member.name]
            block = tuple(1 if (member.name, d) in written else None for d in range(len(shape)))
            spec = specs.setdefault(member.name, TensorSpec(shape, block))
            mask = masks.setdefault(member.name, torch.ones(spec.grid, dtype=torch.bool))
            dead = member.index[~alive[unit.blocks]].ravel()
            mask.index_fill_(member.dim, torch.from_numpy(dead), False)
    return close_on(graph, Ticket(masks, specs, {"order": "random", "seed": seed}))
