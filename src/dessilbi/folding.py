# SPDX-License-Identifier: Apache-2.0
"""Folding: dead channels whose activation is a constant other than 0 move into their consumers.

Where every tap of a consumer sees the constant (a linear layer, a convolution without padding) it
is a bias. Elsewhere one dead channel stays as carrier and gets the outgoing weights of the others,
which is exact with any padding.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from dessilbi.closing import Flags, flagged
from dessilbi.graph import Graph
from dessilbi.graph.units import ConstantColumns
from dessilbi.rewriting import bias_name, place_tensors, widen


def fold(
    graph: Graph, dead: Flags, gone: Flags, tensors: Mapping[str, Tensor], inputs: tuple[Any, ...]
) -> dict[str, Tensor]:
    """Return the tensors with constants of removed blocks moved into biases or carriers.

    Args:
        graph: The graph of the model.
        dead: Blocks that are dead (removed or kept as zeros).
        gone: Blocks that are removed.
        tensors: float64 values of the closed model by name.
        inputs: float64 inputs, in the order of the program's placeholders.

    Raises:
        ValueError: What should be a constant is not, or has no carrier.
    """
    wanted = {c.node for c in graph.constants if (_blocks(graph, c, gone) & c.columns).any()}
    result = dict(tensors)
    if not wanted:
        return result
    module = copy.deepcopy(graph.reading.program.module)
    place_tensors(module, graph, tensors)
    capture = _Capture(widen(module), wanted)
    with torch.no_grad():
        capture.run(*inputs)
    done: dict[str, Tensor] = {}
    for constant in graph.constants:
        if constant.node not in wanted:
            continue
        values = _values(constant, capture.inputs[constant.node], dead, graph)
        name = constant.axis.name
        if name in done:
            if not torch.allclose(done[name], values, rtol=1e-12, atol=1e-12):
                raise ValueError(
                    f"{name} is used twice and reads different constants; keep its units alive"
                )
            continue
        done[name] = values
        _move(graph, constant, gone, values, result)
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
            self.inputs[n.name] = args[0]
        return super().run_node(n)


def _blocks(graph: Graph, constant: ConstantColumns, flags: Flags) -> Flags:
    return flagged(graph.axes[constant.axis], flags)


def _values(constant: ConstantColumns, x: Tensor, dead: Flags, graph: Graph) -> Tensor:
    """Return the constant of every dead column, 0 elsewhere."""
    axis = constant.axis
    weight_rank = len(graph.shapes[axis.name])
    dim = -1 if weight_rank == 2 else x.dim() - weight_rank + 1
    lines = x.movedim(dim, 0).reshape(axis.size, -1)
    chosen = torch.from_numpy(_blocks(graph, constant, dead) & constant.columns)
    spread = (lines.amax(1) - lines.amin(1))[chosen]
    if len(spread) and float(spread.max()) > 1e-12 * (1 + float(lines[chosen].abs().max())):
        raise ValueError(
            f"dead channels read by {axis.name} are not constant after their activation; "
            f"keep their units alive"
        )
    return torch.where(chosen, lines[:, 0], 0)


def _move(
    graph: Graph,
    constant: ConstantColumns,
    gone: Flags,
    values: Tensor,
    tensors: dict[str, Tensor],
) -> None:
    axis = constant.axis
    removed = torch.from_numpy(_blocks(graph, constant, gone) & constant.columns)
    lost = torch.where(removed, values, 0)
    if not bool((lost != 0).any()):
        return
    weight = tensors[axis.name]
    if constant.foldable:
        taps = weight.reshape(weight.shape[0], weight.shape[1], -1).sum(2)
        if axis.groups > 1:
            pieces = lost.reshape(axis.groups, -1).repeat_interleave(
                weight.shape[0] // axis.groups, 0
            )
            shift = (taps * pieces).sum(1)
        else:
            shift = taps @ lost
        name = bias_name(axis.name)
        tensors[name] = tensors[name] + shift if name in tensors else shift
        return
    carriers = torch.where(removed, 0, values)
    best = int(carriers.abs().argmax())
    if float(carriers[best]) == 0.0:
        raise ValueError(
            f"dead channels read by {axis.name} hold constants and none is left to carry them; "
            f"keep one of their units alive"
        )
    weight = weight.clone()
    weight[:, best] += torch.tensordot(weight, lost / carriers[best], dims=([1], [0]))
    tensors[axis.name] = weight
