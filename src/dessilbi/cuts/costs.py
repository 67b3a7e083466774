# SPDX-License-Identifier: Apache-2.0
"""Costs: parameters, bytes and MACs of a model after a cut, without cutting it."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
from torch import Tensor, fx, nn

from dessilbi.blocks.naming import tensor_names, unwrap
from dessilbi.blocks.ticket import Ticket
from dessilbi.cuts.closing import Flags, flagged, settle_on
from dessilbi.cuts.counting import count_program
from dessilbi.cuts.cutting import Cut, Cuts, find_cuts, groups_after
from dessilbi.graph import Graph, Known, Weight
from dessilbi.graph.program import op_name
from dessilbi.graph.shapes import blocks_of

PRODUCTS = frozenset({"matmul", "bmm", "mm", "einsum", "scaled_dot_product_attention"})


@dataclass(frozen=True)
class Cost:
    """What a model costs: parameters, bytes of parameters and buffers, MACs for one sample.

    A sample is one entry of the first dimension of the first input. What is computed once for a
    whole batch is shared out among its samples.
    """

    params: int
    bytes: int
    macs: int


class CostModel:
    """What is left of a model once a ticket is closed and compacted, in numbers.

    Weights are not looked at: where a dead channel holds a constant that only another dead one
    could carry, one is counted as kept.

    Args:
        graph: The graph of the model.
        model: The model itself, for sizes and types of its tensors.

    >>> import torch
    >>> from dessilbi.graph import read_graph
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> CostModel(read_graph(net, torch.ones(1, 4)), net).dense
    Cost(params=58, bytes=232, macs=48)
    """

    def __init__(self, graph: Graph, model: nn.Module):
        model = unwrap(model)
        self.graph = graph
        names = tensor_names(model)
        self._params = {names[n]: _size(p) for n, p in model.named_parameters()}
        self._buffers = {names[n]: _size(b) for n, b in model.named_buffers()}
        program = graph.reading.program.module
        self._products = [node for node in program.graph.nodes if _is_product(graph, node)]
        known = self._macs(np.zeros(graph.num_blocks, bool), {})
        self._other = (count_program(graph.reading) or known) - known

    @property
    def dense(self) -> Cost:
        """The cost of the whole model."""
        return self.after(np.zeros(self.graph.num_blocks, bool))

    def of(self, ticket: Ticket) -> Cost:
        """Return the cost of ``compact`` with this ticket, closed first where it is not."""
        return self.after(settle_on(self.graph, ticket).gone)

    def after(self, gone: Flags) -> Cost:
        """Return the cost once these blocks are removed."""
        graph = self.graph
        cuts = find_cuts(graph, gone)
        left = {name: _left(shape, cuts.get(name, ())) for name, (shape, _) in self._params.items()}
        added = _added_biases(graph, gone, left)
        size = sum(left[name] * width for name, (_, width) in self._params.items())
        size += sum(
            _left(shape, cuts.get(name, ())) * width
            for name, (shape, width) in self._buffers.items()
        )
        size += sum(count * self._params[name][1] for name, count in added.items())
        macs = self._macs(gone, cuts) + self._other
        params = sum(left.values()) + sum(added.values())
        return Cost(params, size, macs // graph.reading.batch)

    def _macs(self, gone: Flags, cuts: Cuts) -> int:
        """Return the MACs of the whole batch, without operations that have no rule."""
        macs = sum(_product(self.graph, gone, cuts, node) for node in self._products)
        for name, count in self.graph.macs.items():
            shape = self.graph.shapes[name]
            macs += count * _left(shape, cuts.get(name, ())) // prod(shape)
        return macs


def _size(tensor: Tensor) -> tuple[tuple[int, ...], int]:
    """Shape, and bytes of one element."""
    return tuple(tensor.shape), tensor.element_size()


def _left(shape: tuple[int, ...], cuts: tuple[Cut, ...]) -> int:
    """Return how many elements of a tensor stay."""
    sizes = list(shape)
    for cut in cuts:
        stays = len(cut.index)
        if cut.groups > 1:
            stays //= max(1, groups_after(cuts, cut.groups))
        sizes[cut.dim] = stays
    return prod(sizes)


def _added_biases(graph: Graph, gone: Flags, left: Mapping[str, int]) -> dict[str, int]:
    """Weight -> elements of the bias it gets because constants are folded into it."""
    added = {}
    for constant in graph.constants:
        name = constant.axis.name
        lost = flagged(graph.axes[constant.axis], gone) & constant.columns
        if constant.bias is None or constant.bias in left or not lost.any():
            continue
        rows = next((b for a, b in graph.axes.items() if (a.name, a.dim) == (name, 0)), None)
        size = graph.shapes[name][0]
        added[name] = size if rows is None else size - int(flagged(rows, gone).sum())
    return added


def _is_product(graph: Graph, node: fx.Node) -> bool:
    """Whether an operation multiplies two activations, or a weight that is not counted yet."""
    if op_name(node) not in PRODUCTS:
        return False
    operand = node.args[1]
    weight = graph.reading.values[operand] if isinstance(operand, fx.Node) else None
    return not (isinstance(weight, Weight) and weight.name in graph.macs)


def _product(graph: Graph, gone: Flags, cuts: Cuts, node: fx.Node) -> int:
    """Return the MACs of one product of two activations."""
    if op_name(node) == "einsum":
        return _einsum(graph, gone, cuts, node)
    one, two = (_sizes_after(graph, gone, cuts, operand) for operand in node.args[:2])
    if op_name(node) == "scaled_dot_product_attention":
        values = _sizes_after(graph, gone, cuts, node.args[2])
        count = prod(one[:-1]) * two[-2] * (one[-1] + values[-1])
    else:
        count = prod(_sizes_after(graph, gone, cuts, node)) * one[-1]
    return count


def _einsum(graph: Graph, gone: Flags, cuts: Cuts, node: fx.Node) -> int:
    """Return the MACs of a product of two tensors: the sizes of all letters, multiplied."""
    equation, operands = node.args[:2]
    assert isinstance(equation, str)
    assert isinstance(operands, list | tuple)
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    if len(terms) != 2 or "." in equation:
        return 0
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        sizes.update(zip(term, _sizes_after(graph, gone, cuts, operand), strict=True))
    return prod(sizes.values())


def _sizes_after(graph: Graph, gone: Flags, cuts: Cuts, node: object) -> list[int]:
    assert isinstance(node, fx.Node)
    value = graph.reading.values[node]
    shape = value.shape if isinstance(value, Tensor | Weight) else value.value.shape
    if isinstance(value, Weight | Known) and value.name is not None:
        left = list(shape)
        for cut in cuts.get(value.name, ()):
            left[cut.dim] = len(cut.index) if cut.groups == 1 else left[cut.dim]
        return left
    blocks = blocks_of(graph.reading, node, graph.block_of_label)
    if blocks is None:
        return list(shape)
    alive = ~flagged(blocks, gone)
    sizes = []
    for dim, size in enumerate(shape):
        others = tuple(d for d in range(alive.ndim) if d != dim)
        stays = int(alive.any(axis=others).sum())
        sizes.append(size if alive.shape[dim] == 1 else stays)
    return sizes
