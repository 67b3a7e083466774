# SPDX-License-Identifier: Apache-2.0
"""Rewriting: the exported program with smaller tensors and the constants that go with them.

Every activation of the result is the original one restricted to what stays, in the same order.
So each operation can be adapted by itself: sizes of views, borders of slices, numbers of groups.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dessilbi.closing import Flags, flagged
from dessilbi.cutting import Cuts, cut_tensor, groups_after
from dessilbi.graph import Graph, Weight
from dessilbi.graph.labels import Ids
from dessilbi.graph.program import op_name
from dessilbi.graph.shapes import Shuffle, blocks_of

Adapt = Callable[["Rewriter", fx.Node], None]
ADAPT: dict[str, Adapt] = {}


@dataclass(frozen=True)
class Resized:
    """A constant in ``forward`` that changes: module that owns it, old and new value."""

    module: str
    old: int
    new: int


@dataclass
class Rewriter:
    """What is known while a program is rewritten."""

    graph: Graph
    gone: Flags
    cuts: Cuts
    module: fx.GraphModule
    originals: dict[str, fx.Node]
    resized: list[Resized] = field(default_factory=list)
    forced: list[str] = field(default_factory=list)
    chosen: dict[str, fx.Node] = field(default_factory=dict)

    def original(self, node: fx.Node) -> fx.Node:
        """The node of the program that was read."""
        return self.originals[node.name]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape before."""
        value = self.graph.reading.values[self.original(node)]
        return tuple(value.shape if isinstance(value, Tensor | Weight) else value.value.shape)

    def kept(self, node: fx.Node) -> list[Ids | None]:
        """Per dimension the indices that stay, None for all; refuses what is not rectangular."""
        original = self.original(node)
        blocks = blocks_of(self.graph.reading, original, self.graph.block_of_label)
        shape = self.shape(node)
        if blocks is None:
            return [None] * len(shape)
        alive = ~flagged(blocks, self.gone)
        result: list[Ids | None] = []
        product = np.ones(alive.shape, bool)
        for dim in range(alive.ndim):
            others = tuple(d for d in range(alive.ndim) if d != dim)
            line = alive.any(axis=others)
            shaped = [1] * alive.ndim
            shaped[dim] = -1
            product &= line.reshape(shaped)
            result.append(None if line.all() else np.flatnonzero(line))
        if not (product == alive).all():
            raise RaggedError(node.name)
        return result

    def note(self, node: fx.Node, old: int, new: int) -> None:
        """Remember a constant that changes."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        self.resized.append(Resized(stack[-1][0] if stack else "", old, new))


class RaggedError(ValueError):
    """What stays of a tensor is not a product of indices."""


def adapt(*names: str) -> Callable[[Adapt], Adapt]:
    """Say how an operation's constants follow."""

    def register(function: Adapt) -> Adapt:
        for name in names:
            ADAPT[name] = function
        return function

    return register


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
    module = copy.deepcopy(source.module)
    originals = {node.name: node for node in source.module.graph.nodes}
    rewriter = Rewriter(graph, gone, cuts, module, originals)
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        shuffle = graph.shuffles.get(node.name)
        if shuffle is not None and _bends(rewriter, node, shuffle):
            _select(rewriter, node, shuffle)
        elif (action := ADAPT.get(op_name(node))) is not None:
            with suppress(RaggedError):  # only inside a shuffle that is replaced as a whole
                action(rewriter, node)
    place_tensors(module, graph, {n: cut_tensor(t, cuts.get(n, ())) for n, t in tensors.items()})
    _add_biases(module, graph, {n: cut_tensor(t, cuts.get(n, ())) for n, t in tensors.items()})
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return rewriter


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


def bias_name(weight: str) -> str:
    """Return the name of the bias that belongs to a weight."""
    return weight.removesuffix("weight") + "bias"


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


def _owner(module: nn.Module, target: str) -> tuple[Any, str]:
    *parts, key = target.split(".")
    owner: Any = module
    for part in parts:
        owner = getattr(owner, part)
    return owner, key


def _bends(rewriter: Rewriter, node: fx.Node, shuffle: Shuffle) -> bool:
    """Whether something inside a shuffle would not be rectangular."""
    inside = node.all_input_nodes[0]
    while inside.name != shuffle.source and inside is not rewriter.chosen.get(shuffle.source):
        try:
            rewriter.kept(inside)
        except RaggedError:
            return True
        inside = inside.all_input_nodes[0]
    return False


def _select(rewriter: Rewriter, node: fx.Node, shuffle: Shuffle) -> None:
    """Replace a shuffle by a selection along one dimension."""
    graph = rewriter.module.graph
    named = {n.name: n for n in graph.nodes}
    source = rewriter.chosen.get(shuffle.source) or named[shuffle.source]
    before, after = rewriter.kept(source)[shuffle.dim], rewriter.kept(node)[shuffle.dim]
    size = rewriter.shape(source)[shuffle.dim]
    old = np.arange(size) if before is None else before
    new = np.arange(size) if after is None else after
    place = np.full(size, -1)
    place[old] = np.arange(len(old))
    order = torch.from_numpy(place[shuffle.order[new]])
    name = f"order_{node.name}"
    rewriter.module.register_buffer(name, order, persistent=True)
    with graph.inserting_before(node):
        index = graph.create_node("get_attr", name)
        arguments = (source, shuffle.dim, index)
        chosen = graph.call_function(torch.ops.aten.index_select.default, arguments)
    node.replace_all_uses_with(chosen)
    rewriter.originals[chosen.name] = rewriter.originals[node.name]
    rewriter.chosen[node.name] = chosen  # a shuffle that follows reads this one
    rewriter.forced.append(f"{node.name} selects channels instead of shuffling them")


@adapt("view", "reshape", "_unsafe_view", "expand", "unflatten", "flatten")
def sizes(rewriter: Rewriter, node: fx.Node) -> None:
    """Sizes written into forward."""
    kept = rewriter.kept(node)
    place = 2 if op_name(node) == "unflatten" else 1
    if len(node.args) <= place or not isinstance(node.args[place], list | tuple):
        return
    shape = list(node.args[place])  # type: ignore[arg-type]
    start = len(kept) - len(shape)
    if place == 2:
        start = int(node.args[1]) % (len(kept) - len(shape) + 1)  # type: ignore[arg-type]
    for position, size in enumerate(shape):
        stays = kept[start + position]
        if stays is None or (isinstance(size, int) and size == -1):
            continue
        if isinstance(size, int):
            rewriter.note(node, size, len(stays))
            shape[position] = len(stays)
        else:  # computed from the batch: let torch infer it
            shape[position] = -1
            rewriter.forced.append(f"{node.name} infers a size")
    node.update_arg(place, shape)


@adapt("slice", "narrow")
def borders(rewriter: Rewriter, node: fx.Node) -> None:
    """Borders count what stays before them."""
    source: Any = node.args[0]
    dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    stays = rewriter.kept(source)[dim]
    if stays is None:
        return
    size = rewriter.shape(source)[dim]
    start, end = [*node.args[2:4], None, None][:2]
    if op_name(node) == "narrow":
        end = int(start) + int(end)  # type: ignore[arg-type]
    step = node.args[4] if len(node.args) > 4 else 1
    low, high, _ = slice(start, end).indices(size)
    if step != 1:
        raise ValueError(f"{node.name} takes every {step}th channel, which cannot be adapted")
    first, last = (int(np.searchsorted(stays, border)) for border in (low, high))
    node.target = torch.ops.aten.slice.Tensor
    node.args = (source, dim, first, last)
    rewriter.note(node, high - low, last - first)


@adapt("select")
def place(rewriter: Rewriter, node: fx.Node) -> None:
    """A single index counts what stays before it."""
    source: Any = node.args[0]
    dim, index = int(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
    stays = rewriter.kept(source)[dim]
    if stays is None:
        return
    index %= rewriter.shape(source)[dim]
    if index not in stays:
        raise ValueError(f"{node.name} picks a channel that is removed; keep it alive")
    node.update_arg(2, int(np.searchsorted(stays, index)))


@adapt("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split")
def parts(rewriter: Rewriter, node: fx.Node) -> None:
    """Parts get the sizes of what stays in them."""
    source: Any = node.args[0]
    dim = int(node.args[2]) if len(node.args) > 2 else int(node.kwargs.get("dim", 0))  # type: ignore[arg-type]
    stays = rewriter.kept(source)[dim]
    if stays is None:
        return
    before = [part.shape[dim] for part in rewriter.graph.reading.values[rewriter.original(node)]]
    ends = np.cumsum(before)
    counts = np.diff(np.searchsorted(stays, ends), prepend=0).tolist()
    node.target = torch.ops.aten.split_with_sizes.default
    node.args = (source, counts, dim)
    node.kwargs = {}
    for old, new in zip(before, counts, strict=True):
        rewriter.note(node, old, new)


@adapt("unbind")
def unbind(rewriter: Rewriter, node: fx.Node) -> None:
    """All of them must stay."""
    source: Any = node.args[0]
    dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    if rewriter.kept(source)[dim] is not None:
        raise ValueError(f"{node.name} takes channels apart one by one, which cannot be adapted")


@adapt("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def groups(rewriter: Rewriter, node: fx.Node) -> None:
    """The number of groups."""
    place = 6
    if len(node.args) <= place or node.args[place] == 1:
        return
    weight: Any = node.args[1]
    name = rewriter.graph.reading.program.weights[str(weight.target)]
    if name in rewriter.cuts:
        node.update_arg(place, groups_after(rewriter.cuts[name], int(node.args[place])))  # type: ignore[arg-type]


@adapt("group_norm")
def norm_groups(rewriter: Rewriter, node: fx.Node) -> None:
    """Whole norm groups go."""
    source: Any = node.args[0]
    stays = rewriter.kept(source)[1]
    if stays is not None:
        count = int(node.args[1])  # type: ignore[arg-type]
        node.update_arg(1, count * len(stays) // rewriter.shape(source)[1])
