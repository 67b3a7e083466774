# SPDX-License-Identifier: Apache-2.0
"""Closing: extend a ticket so that what is dead is exactly 0 everywhere, and hence removable.

A block is dead if all its producers are. Its followers (biases, norm affines, depthwise rows,
gates) are masked too. Dead blocks that cannot be removed come back to life and are listed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dessilbi.graph import Graph, read_graph
from dessilbi.graph.labels import Ids
from dessilbi.graph.program import ExampleInputs
from dessilbi.graph.units import CLOSABLE
from dessilbi.structure import Block
from dessilbi.ticket import TensorSpec, Ticket

Flags = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Settled:
    """Blocks of a model: ``dead`` by the ticket, ``revived``, ``kept`` as zeros, and ``gone``."""

    dead: Flags
    revived: Flags
    kept: Flags

    @property
    def gone(self) -> Flags:
        """Blocks that can be removed."""
        return self.dead & ~self.revived & ~self.kept


def close(ticket: Ticket, model: nn.Module, *, example_inputs: ExampleInputs) -> Ticket:
    """Extend ``ticket`` to followers, so that dead blocks are exactly 0 after their activation.

    Args:
        ticket: Any ticket of ``model``.
        model: The model; it is not changed.
        example_inputs: A tensor, a tuple of forward's arguments, or a dict of its keywords.

    Returns:
        A closed ticket; closing it again changes nothing. ``origin`` says ``closed``, the density
        ``density_before``, and lists the blocks ``revived`` and ``kept_zero`` per unit.

    Raises:
        ValueError: The ticket is of another model, or the model cannot be read.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> spec = TensorSpec(shape=(3, 4), block=(1, None))
    >>> ticket = Ticket({"0.weight": torch.tensor([[True], [False], [True]])}, {"0.weight": spec})
    >>> close(ticket, net, example_inputs=torch.ones(1, 4))["0.bias"]
    tensor([ True, False,  True])
    """
    ticket.density_of_model(model)  # checks names and shapes
    return close_on(read_graph(model, example_inputs), ticket)


def close_on(graph: Graph, ticket: Ticket) -> Ticket:
    """Close a ticket on a graph that is already read."""
    settled = settle(graph, dead_blocks(graph, ticket))
    masks, specs = dict(ticket), dict(ticket.specs)
    for unit in graph.units:
        for flags, alive in ((settled.dead & ~settled.revived, False), (settled.revived, True)):
            chosen = flags[unit.blocks]
            if not chosen.any():
                continue
            for member in unit.members:
                if member.role in CLOSABLE:
                    index = member.index[chosen].ravel()
                    _set(
                        masks,
                        specs,
                        graph.shapes[member.name],
                        member.name,
                        member.dim,
                        index,
                        alive,
                    )
    closed = Ticket(masks, specs, {**ticket.origin, **_told(graph, ticket, settled)})
    return ticket if ticket.origin.get("closed") is True and closed == ticket else closed


def _told(graph: Graph, ticket: Ticket, settled: Settled) -> dict[str, Any]:
    def listed(flags: Flags) -> dict[str, list[int]]:
        found = {unit.name: np.flatnonzero(flags[unit.blocks]).tolist() for unit in graph.units}
        return {name: blocks for name, blocks in found.items() if blocks}

    return {
        "closed": True,
        "density_before": ticket.density,
        "dead_blocks": int(settled.dead.sum()),
        "removable_blocks": int(settled.gone.sum()),
        "revived": listed(settled.revived),
        "kept_zero": listed(settled.kept),
    }


def _set(
    masks: dict[str, Tensor],
    specs: dict[str, TensorSpec],
    shape: tuple[int, ...],
    name: str,
    dim: int,
    index: Ids,
    alive: bool,
) -> None:
    """Write ``alive`` for whole slices along ``dim``, cutting blocks finer where needed."""
    if name not in masks:
        block: Block = tuple(1 if d == dim else None for d in range(len(shape)))
        specs[name] = TensorSpec(shape, block)
        masks[name] = torch.ones(specs[name].grid, dtype=torch.bool)
    spec, mask = specs[name], masks[name].clone()
    length = spec.block[dim]
    if length != 1:
        mask = mask.repeat_interleave(shape[dim] if length is None else length, dim)
        finer = tuple(1 if d == dim else n for d, n in enumerate(spec.block))
        specs[name] = TensorSpec(shape, finer)
    masks[name] = mask.index_fill(dim, torch.from_numpy(index), alive)


def dead_blocks(graph: Graph, ticket: Ticket) -> Flags:
    """Return which blocks are dead: all their producers have no living element."""
    dead = np.ones(graph.num_blocks, bool)
    empty: dict[tuple[str, int], Flags] = {}
    for unit in graph.units:
        for member in unit.producers:
            key = (member.name, member.dim)
            if key not in empty:
                empty[key] = _empty_slices(ticket, *key, graph.shapes[member.name])
            dead[unit.blocks] &= empty[key][member.index].all(axis=1)
    return dead


def _empty_slices(ticket: Ticket, name: str, dim: int, shape: tuple[int, ...]) -> Flags:
    if name not in ticket:
        return np.zeros(shape[dim], bool)
    mask = ticket.mask_of(name).movedim(dim, 0).reshape(shape[dim], -1)
    return np.asarray(~mask.any(dim=1).numpy())


def settle(graph: Graph, dead: Flags, *, multiple_of: int = 1) -> Settled:
    """Decide which dead blocks can go.

    First those that would leave a model uneven are revived, until nothing changes. Then a layer
    that would disappear keeps a block of zeros (and what evenness then asks for).
    """
    gone = dead.copy()
    while len(back := _uneven(graph, gone)):
        gone[back] = False
    revived = dead & ~gone
    rounded = multiple_of <= 1
    while True:
        back = _last_ones(graph, gone, dead & ~revived & ~gone)
        if not len(back):
            back = _uneven(graph, gone)
        if not len(back) and not rounded:
            back, rounded = _rounding(graph, gone, multiple_of), True
            if not len(back):
                break
        elif not len(back):
            break
        gone[back] = False
    return Settled(dead, revived, dead & ~revived & ~gone)


def flagged(blocks: Ids, gone: Flags) -> Flags:
    """Return the flag of every entry of an array of blocks (-1, always there: False)."""
    return np.append(gone, False)[blocks]


def _uneven(graph: Graph, gone: Flags) -> Ids:
    """Return blocks that must stay for tensors to be rectangular and groups to be equal."""
    for rect in graph.rects:
        alive = ~flagged(rect.blocks, gone)
        hull = np.ones(alive.shape, bool)
        for dim in range(alive.ndim):
            others = tuple(d for d in range(alive.ndim) if d != dim)
            hull &= alive.any(axis=others, keepdims=True)
        if len(back := np.unique(rect.blocks[hull & ~alive])):
            return back
    for even in graph.evens:
        if len(back := _uneven_groups(even.inputs, even.outputs, gone)):
            return back
    held = [c for c in graph.constants if not c.foldable and c.axis.groups > 1]
    for constant in held:
        blocks = graph.axes[constant.axis]
        if len(back := np.unique(blocks[flagged(blocks, gone) & constant.columns])):
            return back
    return np.empty(0, np.int64)


def _uneven_groups(inputs: Ids, outputs: Ids, gone: Flags) -> Ids:
    lost_in, lost_out = flagged(inputs, gone), flagged(outputs, gone)
    there = ~(lost_in.all(axis=1) & lost_out.all(axis=1))
    back: list[int] = []
    for blocks, lost in ((inputs, lost_in), (outputs, lost_out)):
        counts = (~lost).sum(axis=1)
        wanted = max(1, int(counts[there].max())) if there.any() else 0
        for group in np.flatnonzero(there & (counts < wanted)):
            back += blocks[group][lost[group]][: wanted - counts[group]].tolist()
    return np.unique(np.asarray(back, np.int64))


def _last_ones(graph: Graph, gone: Flags, zeros: Flags) -> Ids:
    """Return blocks that must stay so that no layer disappears and constants have a carrier."""
    for blocks in graph.axes.values():
        if len(blocks) and flagged(blocks, gone).all():
            return blocks[:1]
    for constant in graph.constants:
        if constant.foldable:
            continue
        blocks = graph.axes[constant.axis]
        lost = flagged(blocks, gone) & constant.columns
        carriers = flagged(blocks, zeros) & constant.columns
        if lost.any() and not carriers.any():
            return blocks[lost][:1]
    return np.empty(0, np.int64)


def _rounding(graph: Graph, gone: Flags, multiple: int) -> Ids:
    """Return blocks that stay as zeros so that widths are multiples of ``multiple``."""
    stay = gone.copy()
    for axis, blocks in graph.axes.items():
        if axis.role != "producer":
            continue
        lost = flagged(blocks, stay)
        missing = -int((~lost).sum()) % multiple
        for block in np.unique(blocks[lost])[:missing]:
            stay[block] = False
    return np.flatnonzero(gone & ~stay)


def units_of(graph: Graph, flags: Flags) -> Mapping[str, int]:
    """Return unit -> number of flagged blocks, where there are any."""
    counts = {unit.name: int(flags[unit.blocks].sum()) for unit in graph.units}
    return {name: count for name, count in counts.items() if count}
