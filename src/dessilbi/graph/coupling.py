# SPDX-License-Identifier: Apache-2.0
"""Coupling: units in the words of param groups, a name and a block shape per parameter."""

from dataclasses import dataclass

import numpy as np

from dessilbi.graph.units import Graph, Unit
from dessilbi.structure import Block


@dataclass(frozen=True)
class Coupling:
    """The unit a parameter belongs to and the block shape that makes its blocks the unit's."""

    unit: str
    structure: Block


def couplings(graph: Graph) -> dict[str, Coupling]:
    """Return parameter -> unit and structure, for producers that a penalty can act on as a whole.

    Block b of every member is block b of the unit, so that norms can be summed over members. Left
    out are parameters only a part of which belongs to the unit, or whose blocks are not runs of
    rows in the unit's order (packed q, k and v; concatenations with offsets): ``close`` makes
    these consistent afterwards.

    >>> import torch
    >>> from dessilbi.graph import read_graph
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> couplings(read_graph(net, torch.ones(1, 4)))["0.weight"].structure
    (1, None)
    """
    found: dict[str, Coupling] = {}
    for unit in graph.units:
        blocks = {m.name: _block(graph, unit, number) for number, m in enumerate(unit.producers)}
        for name, block in blocks.items():
            if block is not None and name not in found:
                found[name] = Coupling(unit.name, block)
    return found


def _block(graph: Graph, unit: Unit, number: int) -> Block | None:
    member = unit.producers[number]
    shape = graph.shapes[member.name]
    length = member.index.shape[1]
    whole = np.arange(member.index.size).reshape(-1, length)
    if member.index.size != shape[member.dim] or (whole != member.index).any():
        return None
    return tuple(length if d == member.dim else None for d in range(len(shape)))
