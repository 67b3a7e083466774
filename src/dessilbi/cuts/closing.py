# SPDX-License-Identifier: Apache-2.0
"""Closing: extend a ticket so that what is dead is exactly 0 everywhere, and hence removable.

A block is dead if all its producers are, or if all that reads it is. Its followers (biases, norm
affines, depthwise rows, gates) are masked too, and so are the columns of its consumers, which then
read only zeros: they cannot act on the output, but a penalty or decay would act on them. So a
closed ticket marks everything that compaction removes. (Columns that read another constant stay,
they do act.) Dead blocks that cannot be removed come back to life and are listed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dessilbi.blocks.structure import extent, owners
from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.cuts.unread import unread_blocks
from dessilbi.graph import Graph, read_graph
from dessilbi.graph.labels import Axis, Ids
from dessilbi.graph.program import ExampleInputs
from dessilbi.graph.units import CLOSABLE

Flags = np.ndarray[Any, np.dtype[np.bool_]]
Constants = Sequence[np.ndarray[Any, np.dtype[np.float64]]]  # per consumer of constants, per column


@dataclass(frozen=True)
class Settled:
    """Blocks of a model: ``dead`` by the ticket, and what becomes of them.

    ``revived`` come back to life, ``kept`` stay as zeros because a layer needs them, ``rounded``
    stay as zeros for a multiple that hardware likes; the others are ``gone``.
    """

    dead: Flags
    revived: Flags
    kept: Flags
    rounded: Flags

    @property
    def gone(self) -> Flags:
        """Blocks that can be removed."""
        return self.dead & ~self.revived & ~self.kept & ~self.rounded


def close(ticket: Ticket, model: nn.Module, *, example_inputs: ExampleInputs) -> Ticket:
    """Extend ``ticket`` to all that hangs on a dead block, so that it is exactly 0 and unread.

    Biases, norms and the like that follow a dead block are masked, and the columns that read it.

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
    return closed_and_settled(graph, ticket)[0]


def closed_and_settled(graph: Graph, ticket: Ticket) -> tuple[Ticket, Settled]:
    """Close a ticket, and tell what can go by it."""
    settled, masks, specs = _settled(graph, ticket)
    closed = Ticket(masks, specs, {**ticket.origin, **_told(graph, ticket, settled)})
    same = ticket.origin.get("closed") is True and closed == ticket
    return ticket if same else closed, settled


def settle_on(graph: Graph, ticket: Ticket) -> Settled:
    """Decide what can go once ``ticket`` is closed, whether it is or not."""
    return _settled(graph, ticket)[0]


def _settled(
    graph: Graph, ticket: Ticket
) -> tuple[Settled, dict[str, Tensor], dict[str, TensorSpec]]:
    """Return what is dead and can go, with the masks and specs that say so.

    Blocks that come back to life may let others go, which may let them go after all: so it is
    settled again from what was found, until nothing changes.
    """
    settled, masks, specs = _settled_once(graph, ticket)
    first = settled.dead
    for _ in range(graph.num_blocks):
        found = Ticket(masks, specs, {"closed": True})
        if found == ticket and ticket.origin.get("closed") is True:
            break
        ticket = found
        settled, masks, specs = _settled_once(graph, ticket)
    dead = first | settled.dead
    return replace(settled, dead=dead, revived=dead & ~settled.gone & ~settled.kept), masks, specs


def _settled_once(
    graph: Graph, ticket: Ticket
) -> tuple[Settled, dict[str, Tensor], dict[str, TensorSpec]]:
    dead = dead_blocks(graph, ticket)
    while True:
        settled = settle(graph, dead)
        masks, specs = _extended(graph, ticket, settled)
        # Rows that read dead blocks only, and have no bias, are 0 as well.
        closed = Ticket(masks, specs, {"closed": True})
        wider = dead | dead_blocks(graph, closed) | _unread(graph, closed, settled)
        if np.array_equal(wider, dead):
            return settled, masks, specs
        dead = wider


def _unread(graph: Graph, ticket: Ticket, settled: Settled) -> Flags:
    """Return further blocks that nobody reads and that could go at once."""
    dead = settled.gone | settled.kept
    more = unread_blocks(graph, ticket) & ~settled.dead
    while more.any():
        revived = settle(graph, dead | more).revived
        if (revived & ~more).any():
            return np.zeros_like(more)
        if not revived.any():
            break
        more &= ~revived
    return more


def _extended(
    graph: Graph, ticket: Ticket, settled: Settled
) -> tuple[dict[str, Tensor], dict[str, TensorSpec]]:
    """Return masks and specs with everything that is dead or revived written into them."""
    masks, specs = dict(ticket), dict(ticket.specs)
    lost = settled.dead & ~settled.revived
    for unit in graph.units:
        for flags, alive in ((lost, False), (settled.revived, True)):
            chosen = flags[unit.blocks]
            if not chosen.any():
                continue
            for member in unit.members:
                if member.role in CLOSABLE:
                    shape, index = graph.shapes[member.name], member.index[chosen].ravel()
                    _refine(masks, specs, member.name, shape, {member.dim: 1})
                    kept = masks[member.name]
                    masks[member.name] = kept.index_fill(member.dim, torch.from_numpy(index), alive)
    _mask_columns(graph, masks, specs, lost)
    return masks, specs


def _mask_columns(
    graph: Graph, masks: dict[str, Tensor], specs: dict[str, TensorSpec], lost: Flags
) -> None:
    """Mask the columns that read nothing but zeros; those that read another constant act."""
    acting: dict[Axis, Flags] = {}
    for constant in graph.constants:
        known = acting.get(constant.axis, np.zeros_like(constant.columns))
        acting[constant.axis] = known | constant.columns
    for axis, blocks in graph.axes.items():
        zeros = flagged(blocks, lost)
        if axis in acting:
            zeros = zeros & ~acting[axis]
        if axis.role != "consumer" or not zeros.any():
            continue
        shape = graph.shapes[axis.name]
        if axis.groups == 1:
            length = gcd(len(zeros), *(np.flatnonzero(np.diff(zeros)) + 1).tolist())
            length = _refine(masks, specs, axis.name, shape, {axis.dim: length})[axis.dim]
            index = torch.from_numpy(np.flatnonzero(zeros[::length]))
            masks[axis.name] = masks[axis.name].index_fill(axis.dim, index, False)
        else:
            _refine(masks, specs, axis.name, shape, {0: shape[0] // axis.groups, 1: 1})
            mask = masks[axis.name].clone()
            inside = torch.from_numpy(zeros).reshape(axis.groups, 1, -1)
            rows = mask.view(axis.groups, -1, *mask.shape[1:])
            rows.masked_fill_(inside.reshape(*inside.shape, *[1] * (mask.dim() - 2)), False)
            masks[axis.name] = mask


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


def _refine(
    masks: dict[str, Tensor],
    specs: dict[str, TensorSpec],
    name: str,
    shape: tuple[int, ...],
    lengths: Mapping[int, int],
) -> tuple[int, ...]:
    """Cut the blocks of a tensor finer, so that their lengths divide those wanted per dimension.

    Returns:
        The lengths of its blocks in numbers.
    """
    if name not in masks:
        specs[name] = TensorSpec(shape, (None,) * len(shape))
        masks[name] = torch.ones(specs[name].grid, dtype=torch.bool)
    block, mask = list(specs[name].block), masks[name]
    for dim, wanted in lengths.items():
        length = block[dim]
        parts = length if isinstance(length, tuple) else (extent(length, shape[dim]),)
        finer = gcd(*parts, wanted)
        if (finer,) != parts:  # packed blocks always come apart into runs
            mask = mask.index_select(dim, owners(length, shape[dim])[::finer])
            block[dim] = finer
    specs[name], masks[name] = TensorSpec(shape, tuple(block)), mask
    return tuple(extent(length, n) for n, length in zip(shape, block, strict=True))


def dead_blocks(graph: Graph, ticket: Ticket) -> Flags:
    """Return which blocks are dead: all their producers have no living element.

    In a closed ticket their followers have none either. There a row may also be empty because it
    reads dead blocks only: if it still adds its bias, it lives.
    """
    roles = CLOSABLE if ticket.origin.get("closed") is True else ("producer",)
    dead = np.ones(graph.num_blocks, bool)
    empty: dict[tuple[str, int], Flags] = {}
    for unit in graph.units:
        for member in unit.members:
            if member.role not in roles:
                continue
            key = (member.name, member.dim)
            if key not in empty:
                empty[key] = _empty_slices(ticket, *key, graph.shapes[member.name])
            dead[unit.blocks] &= empty[key][member.index].all(axis=1)
    return dead


def _empty_slices(ticket: Ticket, name: str, dim: int, shape: tuple[int, ...]) -> Flags:
    if name not in ticket:
        return np.zeros(shape[dim], bool)
    blocks = ticket[name]
    alive = blocks.movedim(dim, 0).reshape(blocks.shape[dim], -1).any(dim=1)
    return np.asarray(~alive[owners(ticket.specs[name].block[dim], shape[dim])].numpy())


def settle(
    graph: Graph, dead: Flags, *, multiple_of: int = 1, constants: Sequence[Constants] = ()
) -> Settled:
    """Decide which dead blocks can go.

    First those that would leave a model uneven are revived, until nothing changes. Then a layer
    that would disappear keeps a block of zeros, constants keep a carrier (for each of
    ``constants``, the values that consumers read), and widths are rounded up.
    """
    gone = dead.copy()
    while len(back := _uneven(graph, gone)):
        gone[back] = False
    revived = dead & ~gone
    needed = gone.copy()
    _give_back(graph, needed, dead & ~revived, 1, constants)
    gone = needed.copy()
    _give_back(graph, gone, dead & ~revived, multiple_of, constants)
    return Settled(dead, revived, dead & ~revived & ~needed, needed & ~gone)


def _give_back(
    graph: Graph, gone: Flags, zeros: Flags, multiple: int, constants: Sequence[Constants]
) -> None:
    """Keep blocks of zeros, in place, until nothing more is needed."""
    while True:
        back = _last_ones(graph, gone, zeros & ~gone, constants)
        if not len(back):
            back = _uneven(graph, gone)
        if not len(back) and multiple > 1:
            back = _rounding(graph, gone, multiple)
        if not len(back):
            return
        gone[back] = False


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
    held = [c for c in graph.constants if c.bias is None and c.axis.groups > 1]
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


def _last_ones(graph: Graph, gone: Flags, zeros: Flags, constants: Sequence[Constants]) -> Ids:
    """Return blocks that must stay so that no layer disappears and constants have a carrier."""
    for blocks in graph.axes.values():
        if len(blocks) and flagged(blocks, gone).all():
            return blocks[:1]
    for number, constant in enumerate(graph.constants):
        if constant.bias is not None:
            continue
        blocks = graph.axes[constant.axis]
        values = [abs(each[number]) for each in constants] or [np.ones(len(blocks))]
        for value in values:  # the largest constant carries those of the others
            able = constant.columns & (value > 0)
            lost, carriers = flagged(blocks, gone) & able, flagged(blocks, zeros) & able
            least = 1e-3 * value[lost].max(initial=0.0)  # a weak carrier would magnify rounding
            if lost.any() and not (carriers & (value >= least)).any():
                return blocks[[np.where(lost, value, 0).argmax()]]
    return np.empty(0, np.int64)


def _rounding(graph: Graph, gone: Flags, multiple: int) -> Ids:
    """Return blocks that stay as zeros so that one more width is a multiple of ``multiple``."""
    for axis, blocks in graph.axes.items():
        lost = flagged(blocks, gone)
        alive = len(blocks) - int(lost.sum())
        if axis.role != "producer" or alive % multiple == 0 or not lost.any():
            continue
        found, rows = np.unique(blocks[lost], return_counts=True)
        order = _evenly(graph, found)
        fits = np.flatnonzero((alive + np.cumsum(rows[order])) % multiple == 0)
        if len(fits):
            return found[order[: fits[0] + 1]]
    return np.empty(0, np.int64)


def _evenly(graph: Graph, blocks: Ids) -> Ids:
    """Return an order of blocks that takes turns between the groups they belong to."""
    turn = np.zeros(len(blocks), np.int64)
    for even in graph.evens:
        for rows in (even.inputs, even.outputs):
            for row in rows:
                mine = np.isin(blocks, row)
                turn[mine] = np.maximum(turn[mine], np.arange(mine.sum()))
    return np.argsort(turn, kind="stable")


def units_of(graph: Graph, flags: Flags) -> Mapping[str, int]:
    """Return unit -> number of flagged blocks, where there are any."""
    counts = {unit.name: int(flags[unit.blocks].sum()) for unit in graph.units}
    return {name: count for name, count in counts.items() if count}
