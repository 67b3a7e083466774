# SPDX-License-Identifier: Apache-2.0
"""Controls: random tickets that keep as many blocks of every layer as a given one."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dessilbi.blocks.structure import block_norms
from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.choosing.choosing import evened, joint_scores, together_on
from dessilbi.choosing.selection import leaders_of
from dessilbi.cuts.closing import close_on
from dessilbi.graph import read_graph
from dessilbi.graph.program import ExampleInputs


def random_like(
    ticket: Ticket,
    specs: Mapping[str, TensorSpec],
    units: Mapping[str, str | None],
    *,
    model: nn.Module,
    example_inputs: ExampleInputs,
    seed: int,
) -> Ticket:
    """Return a closed random ticket that keeps as many blocks of every layer as ``ticket``.

    What is removed together is drawn together, and around grouped convolutions blocks come evenly
    from all groups. Closing takes what reads or feeds nothing alive: little among single weights,
    more where filters are followed by few single weights, as these no longer meet by design.

    Args:
        ticket: Closed or not; tensors it does not name count as whole.
        specs: Shape and block of the structured tensors: what is drawn.
        units: Names of the units the run was trained with, or None per tensor.
        model: The model; it is not changed.
        example_inputs: A tensor, a tuple of forward's arguments, or a dict of its keywords.
        seed: Decides what is drawn; no global random state is read or moved.

    Raises:
        ValueError: The specs are of another model, or the model cannot be read.
    """
    everything = {n: torch.ones(s.grid, dtype=torch.bool) for n, s in specs.items()}
    Ticket(everything, specs).density_of_model(model)  # checks names and shapes
    graph = read_graph(model, example_inputs)
    together = together_on(graph, specs, units)
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: torch.rand(spec.grid, generator=generator, dtype=torch.float64)
        for name, spec in specs.items()
    }
    drawn = evened(graph, joint_scores(drawn, together), specs)
    masks: dict[str, Tensor] = {}
    for names in leaders_of(specs, together):
        kept = max(_kept_blocks(ticket, name, specs[name]) for name in names)
        best = drawn[names[0]].reshape(-1).argsort(descending=True, stable=True)[:kept]
        for name in names:
            flat = torch.zeros(specs[name].num_blocks, dtype=torch.bool)
            flat[best] = True
            masks[name] = flat.reshape(specs[name].grid)
    for name, spec in specs.items():  # of size zero
        masks.setdefault(name, torch.ones(spec.grid, dtype=torch.bool))
    origin = {"kind": "random", "seed": seed, "like": ticket.digest()}
    return close_on(graph, Ticket(masks, specs, origin))


def _kept_blocks(ticket: Ticket, name: str, spec: TensorSpec) -> int:
    """How many blocks of a tensor have something alive in them."""
    if name not in ticket:
        return spec.num_blocks
    return int((block_norms(ticket.mask_of(name).double(), spec.block) > 0).sum())
