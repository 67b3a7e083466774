# SPDX-License-Identifier: Apache-2.0
"""Rewriting: the exported program with smaller tensors and the constants that go with them."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dessilbi.blocks.naming import bias_name
from dessilbi.compaction.adapting import ADAPT, RaggedError, Rewriter
from dessilbi.cuts.closing import Flags
from dessilbi.cuts.cutting import Cuts, cut_tensor
from dessilbi.graph import Graph
from dessilbi.graph.program import op_name
from dessilbi.graph.shapes import Shuffle


def rewrite(graph: Graph, gone: Flags, cuts: Cuts, tensors: Mapping[str, Tensor]) -> Rewriter:
    """Return the program with smaller weights and matching constants.

    Args:
        graph: The graph of the model.
        gone: Blocks to remove.
        cuts: What stays of every tensor.
        tensors: The values of parameters and buffers by name, before the cut.

    Raises:
        ValueError: An operation cannot be adapted; it is named.
    """
    source = graph.reading.program
    module = sharing_copy(source.module)
    originals = {node.name: node for node in source.module.graph.nodes}
    rewriter = Rewriter(graph, gone, cuts, module, originals)
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if op_name(node) == "_assert_scalar":  # about sizes before
            module.graph.erase_node(node)
            continue
        shuffle = graph.shuffles.get(node.name)
        if shuffle is not None and _bends(rewriter, node, shuffle):
            _select(rewriter, node, shuffle)
        elif (action := ADAPT.get(op_name(node))) is not None:
            with suppress(RaggedError):  # only inside a shuffle that is replaced as a whole
                action(rewriter, node)
    smaller = {name: cut_tensor(t, cuts.get(name, ())) for name, t in tensors.items()}
    place_tensors(module, graph, smaller)
    _add_biases(module, graph, smaller)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return rewriter


def sharing_copy(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a program that holds the same tensors."""
    return fx.GraphModule(module, copy.deepcopy(module.graph))


def place_tensors(module: fx.GraphModule, graph: Graph, tensors: Mapping[str, Tensor]) -> None:
    """Put values under the names the program uses; shared tensors stay shared."""
    program = graph.reading.program
    made: dict[str, Tensor] = {}
    for target, name in {**program.weights, **program.buffers}.items():
        owner, key = _owner(module, target)
        old = getattr(owner, key)
        if name not in made:
            new = tensors[name].detach()
            made[name] = nn.Parameter(new, old.requires_grad) if target in program.weights else new
        setattr(owner, key, made[name])


def _add_biases(module: fx.GraphModule, graph: Graph, tensors: Mapping[str, Tensor]) -> None:
    """Give layers that had no bias the one that constants were folded into."""
    for node in list(module.graph.nodes):
        if op_name(node) not in ("linear", "conv1d", "conv2d", "conv3d"):
            continue
        name = graph.reading.program.weights.get(str(getattr(node.args[1], "target", "")))
        if name is None or (len(node.args) > 2 and node.args[2] is not None):
            continue
        bias = tensors.get(bias_name(name))
        if bias is None or "bias" in node.kwargs:
            continue
        target = bias_name(name).replace(".", "_")
        module.register_parameter(target, nn.Parameter(bias.detach()))
        with module.graph.inserting_before(node):
            fetched = module.graph.create_node("get_attr", target)
        node.args = (*node.args[:2], fetched, *node.args[3:])


def widen(module: fx.GraphModule) -> fx.GraphModule:
    """Turn a program to float64, types written into its operations included; in place."""

    def wide(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    for node in list(module.graph.nodes):
        if op_name(node) == "_assert_tensor_metadata":
            module.graph.erase_node(node)
            continue
        node.args = pytree.tree_map(wide, node.args)
        node.kwargs = pytree.tree_map(wide, node.kwargs)
    module.recompile()
    return module.double()


@contextmanager
def wide_literals() -> Iterator[None]:
    """Let tensors that forward makes from nothing be float64 as well."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _owner(module: nn.Module, target: str) -> tuple[Any, str]:
    *parts, key = target.split(".")
    owner: Any = module
    for part in parts:
        owner = getattr(owner, part)
    return owner, key


def _bends(rewriter: Rewriter, node: fx.Node, shuffle: Shuffle) -> bool:
    """Whether something inside a shuffle would not be rectangular."""
    inside = node.all_input_nodes[0]
    while rewriter.original(inside).name != shuffle.source:
        try:
            rewriter.kept(inside)
        except RaggedError:
            return True
        inside = inside.all_input_nodes[0]
    return False


def _select(rewriter: Rewriter, node: fx.Node, shuffle: Shuffle) -> None:
    """Replace a shuffle by a selection along one dimension."""
    named = {n.name: n for n in rewriter.module.graph.nodes}
    source = rewriter.chosen.get(shuffle.source) or named[shuffle.source]
    rewriter.select(node, source, shuffle.dim, shuffle.order)
    rewriter.forced.append(f"{node.name} selects channels instead of shuffling them")
