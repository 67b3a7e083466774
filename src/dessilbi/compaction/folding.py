# SPDX-License-Identifier: Apache-2.0
"""Folding: what removed channels leave behind moves into the tensors that stay.

A dead channel may hold a constant other than 0 after its activation. Where every tap of a consumer
sees it (a linear layer, a convolution without padding) it is a bias. Elsewhere one dead channel
stays as carrier and gets the outgoing weights of the others, which is exact with any padding. And
the weight of an RMSNorm takes up that its mean runs over fewer channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from dessilbi.compaction.rewriting import place_tensors, sharing_copy, wide_literals, widen
from dessilbi.cuts.closing import Constants, Flags, flagged
from dessilbi.graph import Graph
from dessilbi.graph.program import op_name
from dessilbi.graph.units import ConstantColumns


def constants_of(
    graph: Graph, dead: Flags, tensors: Mapping[str, Tensor], inputs: Sequence[Any]
) -> Constants:
    """Return what every consumer of constants reads from dead blocks, 0 from others.

    Args:
        graph: The graph of the model.
        dead: Blocks that are dead.
        tensors: float64 values of the closed model by name.
        inputs: float64 inputs, in the order of the program's placeholders.

    Raises:
        ValueError: What should be a constant is not.
    """
    wanted = {c.node for c in graph.constants if (_blocks(graph, c, dead) & c.columns).any()}
    if not wanted:
        return [np.zeros(c.axis.size) for c in graph.constants]
    module = sharing_copy(graph.reading.program.module)
    place_tensors(module, graph, tensors)
    capture = _Capture(widen(module), wanted)
    with torch.no_grad(), wide_literals():
        capture.run(*inputs)
    return [
        _values(c, capture.inputs[c.node], dead, graph)
        if c.node in wanted
        else np.zeros(c.axis.size)
        for c in graph.constants
    ]


def fold(
    graph: Graph, gone: Flags, constants: Constants, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors with what removed blocks leave behind moved into them.

    Args:
        graph: The graph of the model.
        gone: Blocks that are removed.
        constants: What :func:`constants_of` found.
        tensors: float64 values of the closed model by name.

    Raises:
        ValueError: A constant has no carrier.
    """
    result = dict(tensors)
    for constant, values in zip(graph.constants, constants, strict=True):
        _move(graph, constant, gone, torch.from_numpy(values), result)
    for axis, blocks in graph.axes.items():
        if axis.name in graph.reading.rescaled:
            stays = int((~flagged(blocks, gone)).sum())
            if stays < axis.size:
                result[axis.name] = result[axis.name] * (axis.size / stays) ** 0.5
    return result


class _Capture(fx.Interpreter):
    """Runs a program and keeps what some operations read."""

    def __init__(self, module: fx.GraphModule, wanted: set[str]):
        super().__init__(module)
        self.wanted = wanted
        self.inputs: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.wanted:
            args, _ = self.fetch_args_kwargs_from_env(n)
            self.inputs[n.name] = args[1] if op_name(n) == "addmm" else args[0]
        return super().run_node(n)


def _blocks(graph: Graph, constant: ConstantColumns, flags: Flags) -> Flags:
    return flagged(graph.axes[constant.axis], flags)


def _values(constant: ConstantColumns, x: Tensor, dead: Flags, graph: Graph) -> Any:
    """Return the constant of every dead column, 0 elsewhere."""
    axis = constant.axis
    weight_rank = len(graph.shapes[axis.name])
    dim = -1 if weight_rank == 2 else x.dim() - weight_rank + 1
    lines = x.movedim(dim, 0).reshape(axis.size, -1).cpu().numpy()
    chosen = _blocks(graph, constant, dead) & constant.columns
    spread = (lines.max(axis=1) - lines.min(axis=1))[chosen]
    if len(spread) and not spread.max() <= 1e-12 * (1 + abs(lines[chosen]).max()):
        raise ValueError(
            f"dead channels read by {axis.name} are not constant after their activation; "
            f"keep their units alive"
        )
    return np.where(chosen, lines[:, 0], 0.0)


def _move(
    graph: Graph, constant: ConstantColumns, gone: Flags, values: Tensor, tensors: dict[str, Tensor]
) -> None:
    axis = constant.axis
    weight = tensors[axis.name].movedim(axis.dim, 1)
    removed = torch.from_numpy(_blocks(graph, constant, gone) & constant.columns)
    lost = torch.where(removed, values, 0).to(weight)
    if not bool((lost != 0).any()):
        return
    if constant.bias is not None:
        taps = weight.reshape(weight.shape[0], weight.shape[1], -1).sum(2)
        rows = weight.shape[0] // axis.groups
        pieces = lost.reshape(axis.groups, -1).repeat_interleave(rows, 0)
        shift = (taps * pieces).sum(1)
        tensors[constant.bias] = tensors.get(constant.bias, 0) + shift
        return
    carriers = torch.where(removed, 0, values).to(weight)
    best = int(carriers.abs().argmax())
    if float(carriers[best]) == 0.0:
        raise ValueError(
            f"dead channels read by {axis.name} hold constants and none is left to carry them; "
            f"keep one of their units alive"
        )
    weight = weight.clone()
    weight[:, best] += torch.tensordot(weight, lost / carriers[best], dims=([1], [0]))
    tensors[axis.name] = weight.movedim(1, axis.dim)
