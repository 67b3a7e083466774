# SPDX-License-Identifier: Apache-2.0
"""Coupling: units in the words of param groups, a name and a block shape per parameter."""

from collections import Counter
from dataclasses import dataclass
from math import prod

import numpy as np
from torch import fx

from dessilbi.blocks.structure import Block, indices
from dessilbi.graph.labels import Ids
from dessilbi.graph.program import op_name
from dessilbi.graph.reader import shape_of
from dessilbi.graph.units import Graph, Unit

_CONVOLUTIONS = frozenset(
    f"conv{transposed}{rank}d" for transposed in ("", "_transpose") for rank in (1, 2, 3)
)
# Where these have what they read and their weight: place and keyword of the argument.
_DENSE = {
    "linear": ((0, "input"), (1, "weight")),
    "addmm": ((1, "mat1"), (2, "mat2")),  # the linear layers of GPT-2
}


@dataclass(frozen=True)
class Coupling:
    """The unit a parameter belongs to and the block shape that makes its blocks the unit's."""

    unit: str
    structure: Block


def couplings(graph: Graph) -> dict[str, Coupling]:
    """Return parameter -> unit and structure, for producers that a penalty can act on as a whole.

    Block b of every member is block b of the unit, so that norms can be summed over members. Left
    out are parameters only a part of which belongs to the unit, or whose blocks are not runs of
    rows in the unit's order, one run or one in each packed part (concatenations with offsets):
    ``close`` makes these consistent afterwards.

    >>> import torch
    >>> from dessilbi.graph import read_graph
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> couplings(read_graph(net, torch.ones(1, 4)))["0.weight"].structure
    (1, None)
    """
    times = Counter(member.name for unit in graph.units for member in unit.producers)
    found: dict[str, Coupling] = {}
    for unit in graph.units:
        for number, member in enumerate(unit.producers):
            block = _block(graph, unit, number)
            if block is not None and times[member.name] == 1:
                found[member.name] = Coupling(unit.name, block)
    return found


def _block(graph: Graph, unit: Unit, number: int) -> Block | None:
    member = unit.producers[number]
    shape = graph.shapes[member.name]
    if member.index.size != shape[member.dim]:
        return None
    length = _length(member.index)
    if length is None or (indices(length, member.index.size).numpy() != member.index).any():
        return None
    return tuple(length if d == member.dim else None for d in range(len(shape)))


def _length(index: Ids) -> int | tuple[int, ...] | None:
    """How long the runs of the first block are, one per packed part; None: not in order."""
    first = index[0]
    runs = np.split(first, np.flatnonzero(np.diff(first) != 1) + 1)
    lengths = tuple(len(run) for run in runs)
    return lengths[0] if len(lengths) == 1 else lengths


def filters(graph: Graph) -> frozenset[str]:
    """Return the weights whose rows are filters: they are applied at every position of a sample.

    These are convolutions, and linear layers (those of GPT-2 have their filters in the last
    dimension) that read a feature vector per token or pixel rather than one per sample.

    >>> import torch
    >>> from dessilbi.graph import read_graph
    >>> net = torch.nn.Linear(4, 8)
    >>> filters(read_graph(net, torch.ones(1, 4))), filters(read_graph(net, torch.ones(1, 5, 4)))
    (frozenset(), frozenset({'weight'}))
    """
    program = graph.reading.program
    found = set()
    for node in program.module.graph.nodes:
        kind = op_name(node)
        if kind in _CONVOLUTIONS or kind in _DENSE:
            place, key = (1, "weight") if kind in _CONVOLUTIONS else _DENSE[kind][1]
            name = program.weights.get(str(getattr(_argument(node, place, key), "target", "")))
            if name is not None and (kind in _CONVOLUTIONS or _slides(graph, node, kind)):
                found.add(name)
    return frozenset(found)


def _argument(node: fx.Node, place: int, name: str) -> object:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def _slides(graph: Graph, node: fx.Node, kind: str) -> bool:
    """Whether a linear layer is applied more than once per sample, tokens flattened or not."""
    read = _argument(node, *_DENSE[kind][0])
    assert isinstance(read, fx.Node)
    shape = shape_of(read.meta["val"])
    return len(shape) > 2 or prod(shape[:-1]) > graph.reading.batch


def why_alone(graph: Graph, name: str) -> str:
    """Say why :func:`couplings` has no entry for a parameter."""
    found = [m for unit in graph.units for m in unit.producers if m.name == name]
    if len(found) > 1:
        return f"rows of {name} belong to {len(found)} units"
    if found and found[0].index.size != graph.shapes[name][found[0].dim]:
        size = graph.shapes[name][found[0].dim]
        return f"only {found[0].index.size} of the {size} rows of {name} belong to a unit"
    if found:
        return f"the blocks of {name} do not follow one another in the order of its unit"
    for unit in graph.units:
        if any(member.name == name for member in unit.followers):
            return f"it goes with unit {unit.name!r} and has no blocks of its own"
    if name in graph.left_out:
        return graph.left_out[name]
    if name in graph.shapes:
        return "nothing that it belongs to can be removed"
    return "forward does not use it in eval mode"
