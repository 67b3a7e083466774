# SPDX-License-Identifier: Apache-2.0
"""Shapes: tensors with several labelled dimensions, and shuffles that may bend them.

A tensor that loses elements must stay rectangular. Only the inside of a pure shuffle (view,
transpose, view) need not: the whole of it can be replaced by a selection along one dimension.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from dessilbi.graph.labels import Ids, small
from dessilbi.graph.program import op_name
from dessilbi.graph.reader import Known, Reader, Weight

_STEPS = frozenset(
    [
        "view",
        "reshape",
        "_unsafe_view",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "contiguous",
        "clone",
        "unsqueeze",
        "squeeze",
        "movedim",
        "swapaxes",
        "t",
    ]
)


@dataclass(frozen=True)
class Rect:
    """Blocks of an activation (-1: always there); what is left must be a product of indices."""

    node: str
    blocks: Ids


@dataclass(frozen=True)
class Shuffle:
    """``node`` equals ``source.index_select(dim, order)``."""

    node: str
    source: str
    dim: int
    order: Ids


def blocks_of(reader: Reader, node: fx.Node, block_of_label: Ids) -> Ids | None:
    """Return the blocks of an activation, dimensions without variation at size 1."""
    value = reader.values.get(node)
    if not isinstance(value, Tensor):
        return None
    blocks = block_of_label[small([value])[0].numpy()]
    for dim in range(blocks.ndim):
        first = blocks.take([0], axis=dim)
        if blocks.shape[dim] > 1 and (blocks == first).all():
            blocks = first
    return blocks if (blocks >= 0).any() else None


def find_rects(reader: Reader, block_of_label: Ids) -> tuple[tuple[Rect, ...], dict[str, Shuffle]]:
    """Find activations whose blocks vary along several dimensions, and shuffles around them."""
    several: dict[fx.Node, Ids] = {}
    for node in reader.program.module.graph.nodes:
        blocks = blocks_of(reader, node, block_of_label)
        if blocks is not None and sum(size > 1 for size in blocks.shape) > 1:
            several[node] = blocks
    shuffles: dict[str, Shuffle] = {}
    inside: set[fx.Node] = set()
    for node in reversed(several):
        if op_name(node) not in _STEPS or not node.users:
            continue
        ends = [user for user in node.users if user not in several]
        found = [_shuffle(reader, user, several) for user in ends]
        if all(found) and all(user in inside for user in node.users if user in several):
            inside.add(node)
            shuffles.update({s.node: s for s in found if s is not None})
    rects = tuple(Rect(node.name, b) for node, b in several.items() if node not in inside)
    return rects, shuffles


def _shuffle(reader: Reader, node: fx.Node, several: dict[fx.Node, Ids]) -> Shuffle | None:
    """Return what ``node`` selects from the last rectangular tensor before it, if it does."""
    chain = [node]
    while chain[-1] in several or chain[-1] is node:
        if op_name(chain[-1]) not in _STEPS:
            return None
        chain.append(chain[-1].all_input_nodes[0])
    source = chain.pop()
    shape = reader.values[source].shape
    numbers = torch.arange(int(np.prod(shape))).reshape(shape)
    values: dict[fx.Node, Any] = {source: numbers}
    for step in reversed(chain):
        values[step] = _run(reader, step, values)
    moved = values[node]
    for dim in range(len(shape)):
        if moved.shape != numbers.shape:
            return None
        lines = moved.movedim(dim, 0).reshape(shape[dim], -1)[:, 0]
        starts = numbers.movedim(dim, 0).reshape(shape[dim], -1)[:, 0]
        order = torch.searchsorted(starts.contiguous(), lines.contiguous()).clamp(
            max=shape[dim] - 1
        )
        if torch.equal(numbers.index_select(dim, order), moved):
            return Shuffle(node.name, source.name, dim, order.numpy())
    return None


def _run(reader: Reader, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    def plain(item: fx.Node) -> Any:
        value = values.get(item, reader.values[item])
        if isinstance(value, Weight):
            return torch.zeros(value.shape)
        return value.value if isinstance(value, Known) else value

    args = fx.map_arg(node.args, plain)
    kwargs = fx.map_arg(node.kwargs, plain)
    target: Any = node.target
    if "view" in op_name(node):
        target = torch.ops.aten.reshape.default
    return target(*args, **kwargs)
