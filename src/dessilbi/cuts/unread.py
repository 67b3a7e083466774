# SPDX-License-Identifier: Apache-2.0
"""Unread: blocks whose every reader is dead; whatever they hold never reaches the output.

Only weights of linear layers and convolutions count as readers here. A block that any other
operation takes in without handing it on (a product of activations, a sum over channels) is read,
and so is one that a norm mixes into others.
"""

from typing import Any

import numpy as np
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dessilbi.blocks.ticket import Ticket
from dessilbi.graph import Graph, Member, Weight
from dessilbi.graph.labels import small
from dessilbi.graph.program import op_name

Flags = np.ndarray[Any, np.dtype[np.bool_]]

_LAYERS = frozenset(
    {"linear", "conv1d", "conv2d", "conv3d"}
    | {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
)
# They hand every channel on and yet mix it into the others.
_MIXING = frozenset({"rms_norm", "_fused_rms_norm", "layer_norm", "softmax", "_softmax"})


def unread_blocks(graph: Graph, ticket: Ticket) -> Flags:
    """Return which blocks are read by weights only, all of which the ticket holds dead."""
    unread = np.zeros(graph.num_blocks, bool)
    for unit in graph.units:
        readers = unit.consumers
        if readers and all(member.name in ticket for member in readers):
            empty = [_empty(ticket, member, graph.shapes[member.name]) for member in readers]
            unread[unit.blocks] = np.logical_and.reduce(empty)
    return unread & ~_taken_in(graph) if unread.any() else unread


def _empty(ticket: Ticket, member: Member, shape: tuple[int, ...]) -> Flags:
    """Return for every block of a consumer whether its columns have no living element."""
    mask = ticket.mask_of(member.name)
    if member.groups > 1:  # every group of rows has columns of its own
        mask = mask.reshape(member.groups, shape[0] // member.groups, *shape[1:])
        lines = mask.movedim(2, 1).reshape(member.groups * shape[1], -1)
    else:
        lines = mask.movedim(member.dim, 0).reshape(shape[member.dim], -1)
    dead = ~lines.any(dim=1).numpy()
    return np.asarray(dead[member.index].all(axis=1))


def _taken_in(graph: Graph) -> Flags:
    """Return blocks that an operation other than a layer takes in and does not hand on."""
    if "taken in" not in graph.memory:
        graph.memory["taken in"] = _looked_for(graph)
    found: Flags = graph.memory["taken in"]
    return found


def _looked_for(graph: Graph) -> Flags:
    found = np.zeros(graph.num_blocks + 1, bool)  # the last entry stands for "no block"
    for node in graph.reading.program.module.graph.nodes:
        if node.op not in ("call_function", "output"):
            continue
        layer = op_name(node) in _LAYERS and any(
            isinstance(graph.reading.values.get(source), Weight) for source in node.all_input_nodes
        )
        if not layer:
            before = np.zeros_like(found)
            for source in node.all_input_nodes:
                before |= _blocks_in(graph, source)
            mixes = op_name(node) in _MIXING
            found |= before if mixes else before & ~_blocks_in(graph, node)
    return found[:-1]


def _blocks_in(graph: Graph, node: fx.Node) -> Flags:
    found = np.zeros(graph.num_blocks + 1, bool)
    for value in pytree.tree_leaves(graph.reading.values.get(node)):
        if isinstance(value, Tensor):
            found[graph.block_of_label[small([value])[0].numpy()]] = True
    return found
