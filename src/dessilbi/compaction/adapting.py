# SPDX-License-Identifier: Apache-2.0
"""Adapting: how the constants of each operation follow when tensors get smaller.

Every activation of the smaller program is the original one restricted to what stays, in the same
order. So each operation can be adapted by itself, with one small function per operation (add
yours with :func:`adapt`): sizes of views, borders of slices, numbers of groups.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from dessilbi.cuts.closing import Flags, flagged
from dessilbi.cuts.cutting import Cuts, groups_after
from dessilbi.graph import Graph, Known, Weight
from dessilbi.graph.labels import Ids
from dessilbi.graph.program import op_name
from dessilbi.graph.shapes import blocks_of

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
        value = self.graph.reading.values[original]
        if isinstance(value, Weight | Known) and value.name is not None:
            cuts = {cut.dim: cut.index for cut in self.cuts.get(value.name, ()) if cut.groups == 1}
            return [cuts.get(dim) for dim in range(len(self.shape(node)))]
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

    def select(self, node: fx.Node, source: fx.Node, dim: int, order: Ids) -> fx.Node:
        """Replace an operation by a selection of what stays; before, ``order`` was what it took."""
        before, after = self.kept(source)[dim], self.kept(node)[dim]
        size = self.shape(source)[dim]
        old = np.arange(size) if before is None else before
        new = np.arange(len(order)) if after is None else after
        place = np.full(size, -1)
        place[old] = np.arange(len(old))
        index = torch.from_numpy(place[order[new]])
        if (index < 0).any():
            raise ValueError(f"{node.name} picks a channel that is removed; keep it alive")
        graph = self.module.graph
        with graph.inserting_before(node):
            arguments = (source, dim, self.constant(f"order_{node.name}", index))
            chosen = graph.call_function(torch.ops.aten.index_select.default, arguments)
        self.replace(node, chosen)
        return chosen

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """Return a new operation, placed where the graph inserts, that fetches a new buffer."""
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        self.module.register_buffer(name, value.to(device), persistent=True)
        return self.module.graph.create_node("get_attr", name)

    def replace(self, node: fx.Node, other: fx.Node) -> None:
        """Let all readers of an operation read another one instead, which may read the first."""
        node.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)
        original = self.originals[node.name]
        self.originals[other.name] = original
        self.chosen[original.name] = other


class RaggedError(ValueError):
    """What stays of a tensor is not a product of indices."""


def adapt(*names: str) -> Callable[[Adapt], Adapt]:
    """Say how an operation's constants follow; raise ValueError where they cannot.

    The decorated function gets the :class:`Rewriter` and the operation, and changes it in place.

    >>> @adapt("times_width")
    ... def times_width(rewriter, node):
    ...     stays = rewriter.kept(node.args[0])[1]
    ...     if stays is not None:
    ...         node.update_arg(1, len(stays))
    """

    def register(function: Adapt) -> Adapt:
        for name in names:
            ADAPT[name] = function
        return function

    return register


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
    size_of = rewriter.shape(source)
    dim = (int(node.args[1]) if len(node.args) > 1 else 0) % len(size_of)  # type: ignore[arg-type]
    stays, size = rewriter.kept(source)[dim], size_of[dim]
    if stays is None:
        return
    start, end = [*node.args[2:4], None, None][:2]
    if op_name(node) == "narrow":
        end = int(start) + int(end)  # type: ignore[arg-type]
    step: Any = node.args[4] if len(node.args) > 4 else 1
    if step != 1:
        rewriter.select(node, source, dim, np.arange(size)[slice(start, end, step)])
        return
    low, high, _ = slice(start, end).indices(size)
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


@adapt("index_select", "index")
def positions(rewriter: Rewriter, node: fx.Node) -> None:
    """A list of positions counts what stays before them."""
    source, second = node.args[:2]
    shape = rewriter.shape(source)  # type: ignore[arg-type]
    places: Any = {second % len(shape): node.args[-1]} if isinstance(second, int) else second
    if not isinstance(second, int):
        places = {d: place for d, place in enumerate(places) if place is not None}
    (dim, picked), *more = places.items()
    known: Any = rewriter.graph.reading.values[rewriter.original(picked)]
    if not more and known.value.dim() == 1 and rewriter.kept(source)[dim] is not None:  # type: ignore[arg-type]
        rewriter.select(node, source, dim, np.arange(shape[dim])[known.value.cpu().numpy()])  # type: ignore[arg-type]


@adapt("channel_shuffle")
def shuffle(rewriter: Rewriter, node: fx.Node) -> None:
    """A shuffle of what stays is a selection."""
    source: Any = node.args[0]
    size = rewriter.shape(source)[1]
    if rewriter.kept(source)[1] is not None:
        groups = int(node.args[1])  # type: ignore[arg-type]
        rewriter.select(node, source, 1, np.arange(size).reshape(groups, -1).T.ravel())


@adapt("pad", "constant_pad_nd")
def borders_around(rewriter: Rewriter, node: fx.Node) -> None:
    """Channels that are cut off count what stays among them; added ones stay."""
    source: Any = node.args[0]
    kept, shape = rewriter.kept(source), rewriter.shape(source)
    sizes: list[int] = list(node.args[1])  # type: ignore[arg-type]
    for place in range(len(sizes) // 2):
        dim = len(shape) - 1 - place
        stays = kept[dim]
        if stays is None:
            continue
        before, after = sizes[2 * place : 2 * place + 2]
        if before < 0:
            sizes[2 * place] = -int((stays < -before).sum())
        if after < 0:
            sizes[2 * place + 1] = -int((stays >= shape[dim] + after).sum())
    node.update_arg(1, sizes)


@adapt("slice_scatter")
def written_part(rewriter: Rewriter, node: fx.Node) -> None:
    """Borders count what stays before them."""
    source: Any = node.args[0]
    shape = rewriter.shape(source)
    dim = (int(node.args[2]) if len(node.args) > 2 else 0) % len(shape)  # type: ignore[arg-type]
    stays = rewriter.kept(source)[dim]
    if stays is None:
        return
    start, end, step = [*node.args[3:6], *[None] * 3][:3]
    if step not in (None, 1):
        _written_by_steps(rewriter, node, dim, slice(start, end, step))
        return
    low, high, _ = slice(start, end).indices(shape[dim])
    first, last = (int(np.searchsorted(stays, border)) for border in (low, high))
    node.args = (source, node.args[1], dim, first, last)


def _written_by_steps(rewriter: Rewriter, node: fx.Node, dim: int, part: slice) -> None:
    """What stays, picked from both one after the other."""
    source, written = node.args[:2]
    size = rewriter.shape(source)[dim]  # type: ignore[arg-type]
    before = rewriter.kept(source)[dim]  # type: ignore[arg-type]
    assert before is not None
    mine = np.isin(before, np.arange(size)[part])
    order = np.arange(len(before))
    order[mine] = len(before) + np.arange(mine.sum())
    graph = rewriter.module.graph
    with graph.inserting_before(node):
        both = graph.call_function(torch.ops.aten.cat.default, ([source, written], dim))
        index = rewriter.constant(f"order_{node.name}", torch.from_numpy(order))
        chosen = graph.call_function(torch.ops.aten.index_select.default, (both, dim, index))
    rewriter.replace(node, chosen)


@adapt("mean")
def old_count(rewriter: Rewriter, node: fx.Node) -> None:
    """A mean over fewer channels divides by as many as before."""
    source: Any = node.args[0]
    shape, kept = rewriter.shape(source), rewriter.kept(source)
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    share = 1.0
    for dim in [dims] if isinstance(dims, int) else dims or range(len(shape)):
        stays = kept[dim]
        share *= 1.0 if stays is None else len(stays) / shape[dim]
    if share != 1.0:
        graph = rewriter.module.graph
        with graph.inserting_after(node):
            scaled = graph.call_function(torch.ops.aten.mul.Tensor, (node, share))
        rewriter.replace(node, scaled)


@adapt("rms_norm", "_fused_rms_norm")
def root_mean_square(rewriter: Rewriter, node: fx.Node) -> None:
    """The shape, and eps times what the mean square grows by; the weight is rescaled as well."""
    source: Any = node.args[0]
    stays = rewriter.kept(source)[-1]
    eps: Any = node.args[3] if len(node.args) > 3 else None
    if eps is None:  # what torch takes for None depends on the type, which the proof changes
        eps = torch.finfo(source.meta["val"].dtype).eps
    if stays is not None and len(node.args[1]) == 1:  # type: ignore[arg-type]
        eps *= rewriter.shape(source)[-1] / len(stays)
        node.update_arg(1, [len(stays)])
    node.args = (*node.args[:2], node.args[2] if len(node.args) > 2 else None, eps)


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
