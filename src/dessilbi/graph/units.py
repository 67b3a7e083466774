# SPDX-License-Identifier: Apache-2.0
"""Units: what a reading says can be removed together, as one plain value.

A *block* is the smallest thing that can be removed: one class of labels, with all rows, followers
and columns in it. Blocks that look alike (the same weights, as often) form a :class:`Unit`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from dessilbi.graph.labels import Axis, Ids
from dessilbi.graph.program import ExampleInputs, read_program
from dessilbi.graph.reader import Reader
from dessilbi.graph.shapes import Rect, Shuffle, find_rects
from dessilbi.graph.walking import read

CLOSABLE = ("producer", "gate", "follower")


@dataclass(frozen=True)
class Member:
    """The share of one tensor in a unit: ``index[b]`` are the indices of block b along ``dim``.

    ``role``: ``producer`` (all must be dead for the block to be dead), ``gate`` (only multiplies
    it), ``follower`` (biases, norms, depthwise rows), ``statistic`` (buffers) or ``consumer``.
    """

    name: str
    dim: int
    role: str
    index: Ids
    groups: int = 1


@dataclass(frozen=True)
class Unit:
    """Blocks of several tensors that can only live or die together, block by block.

    ``kind`` says what a block is: a ``head`` of attention, a ``filter`` of convolutions, a
    ``neuron`` of one linear layer (or of several that multiply), or one of the ``width`` of a
    residual stream, in which the outputs of several layers are added up.
    """

    name: str
    blocks: Ids
    members: tuple[Member, ...]
    kind: str = "neuron"

    @property
    def num_blocks(self) -> int:
        """How many blocks can be removed."""
        return len(self.blocks)

    @property
    def producers(self) -> tuple[Member, ...]:
        """Members that must be dead for a block to be dead."""
        return tuple(m for m in self.members if m.role == "producer")

    @property
    def followers(self) -> tuple[Member, ...]:
        """Members that go with the producers."""
        return tuple(m for m in self.members if m.role in ("gate", "follower", "statistic"))

    @property
    def consumers(self) -> tuple[Member, ...]:
        """Members that read the unit."""
        return tuple(m for m in self.members if m.role == "consumer")


@dataclass(frozen=True)
class EvenGroups:
    """Blocks of a grouped convolution, one row per group (-1: always there)."""

    name: str
    inputs: Ids
    outputs: Ids


@dataclass(frozen=True)
class ConstantColumns:
    """Columns of a consumer that read a constant other than 0 when their block is dead."""

    axis: Axis
    columns: np.ndarray[Any, np.dtype[np.bool_]]
    bias: str | None
    node: str


@dataclass(frozen=True)
class Graph:
    """What hangs together in a model.

    Args:
        units: What can be removed.
        left_out: Weight -> why (some of) its rows cannot be removed.
        axes: Dimension of a tensor -> the block of every index (-1: always there).
        shapes: Tensor -> shape.
        macs: Weight -> multiply-accumulates for the ``reading.batch`` samples of the program.
        evens: What grouped convolutions demand.
        rects: What tensors with several labelled dimensions demand.
        constants: Consumers of constants.
        shuffles: Operations that may be replaced by a selection along one dimension.
        reading: The labels of every operation, for surgery.
        memory: What follows from the graph alone and takes long, by name; it is worked out once.
    """

    units: tuple[Unit, ...]
    left_out: Mapping[str, str]
    axes: Mapping[Axis, Ids]
    shapes: Mapping[str, tuple[int, ...]]
    macs: Mapping[str, int]
    evens: tuple[EvenGroups, ...]
    rects: tuple[Rect, ...]
    constants: tuple[ConstantColumns, ...]
    shuffles: Mapping[str, Shuffle]
    reading: Reader
    block_of_label: Ids
    memory: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @cached_property
    def num_blocks(self) -> int:
        """Number of removable blocks of the whole model."""
        return sum(unit.num_blocks for unit in self.units)

    def even_groups(self, unit: Unit) -> list[Ids]:
        """Return positions of the unit's blocks that grouped convolutions keep apart.

        As many blocks must stay in each of these as in the others, or they cannot be removed.
        """
        kinds = []
        for even in self.evens:
            for rows in (even.inputs, even.outputs):
                group = np.zeros(self.num_blocks, np.int64)
                for number, blocks in enumerate(rows):
                    group[blocks[blocks >= 0]] = number
                kinds.append(group[unit.blocks])
        if not kinds:
            return [np.arange(unit.num_blocks)]
        _, which = np.unique(np.stack(kinds), axis=1, return_inverse=True)
        return [np.flatnonzero(which.ravel() == kind) for kind in range(which.max() + 1)]

    def __repr__(self) -> str:
        """One line per unit."""
        lines = [f"Graph({len(self.units)} units, {self.num_blocks:,} removable blocks)"]
        for unit in self.units:
            names = ", ".join(dict.fromkeys(m.name for m in unit.producers))
            lines.append(f"  {unit.name}: {unit.num_blocks} blocks of {names}")
        return "\n".join(lines + [f"  left out {n}: {why}" for n, why in self.left_out.items()])


def read_graph(model: nn.Module, example_inputs: ExampleInputs) -> Graph:
    """Read which blocks of ``model`` can be removed together.

    Args:
        model: Any model that torch.export can follow; mode and statistics stay untouched.
        example_inputs: A tensor, a tuple of forward's arguments, or a dict of its keywords.

    Returns:
        A plain value: units, what is left out and why.

    Raises:
        ValueError: The model cannot be read with these inputs.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> graph = read_graph(net, torch.ones(1, 4))
    >>> [(unit.name, unit.num_blocks) for unit in graph.units]
    [('0.weight', 8)]
    """
    return build_graph(read(read_program(model, example_inputs)))


def build_graph(reader: Reader) -> Graph:
    """Turn a finished reading into units."""
    labels = reader.labels
    _join_axes(reader)
    placed = _place_elements(reader)
    for axis, ids in placed.items():
        if len(ids) and len(np.unique(labels.roots(ids))) == 1:
            labels.freeze(ids, f"all of {axis.name} would have to go at once")
    frozen = labels.frozen_roots()
    roots = labels.roots(np.arange(len(labels.parent)))
    parts = _split_roles(reader, placed, roots)
    order: dict[int, int] = {}
    for axis, role, where in parts:
        if role == "producer":
            for root in roots[placed[axis][where]].tolist():
                if root and root not in frozen:
                    order.setdefault(root, len(order))
    block_of_root = np.full(len(labels.parent), -1, np.int64)
    block_of_root[list(order)] = list(order.values())
    block_of_label = block_of_root[roots]
    block_of_label[0] = -1
    axes = {axis: block_of_label[ids] for axis, ids in placed.items()}
    rects, shuffles = find_rects(reader, block_of_label)
    return Graph(
        units=tuple(
            replace(unit, kind=_kind(reader, unit, block_of_label))
            for unit in _units(axes, parts, len(order))
        ),
        left_out=_left_out(reader, placed, axes, roots, frozen),
        axes=axes,
        shapes=dict(reader.shapes),
        macs=dict(reader.macs),
        evens=tuple(
            EvenGroups(e.name, block_of_label[e.inputs], block_of_label[e.outputs])
            for e in reader.evens
        ),
        rects=rects,
        constants=tuple(
            ConstantColumns(c.axis, block_of_label[c.labels] >= 0, c.bias, c.node)
            for c in reader.constants
        ),
        shuffles=shuffles,
        reading=reader,
        block_of_label=block_of_label,
    )


def _join_axes(reader: Reader) -> None:
    """The same dimension in two roles (a shared or tied weight) has one set of labels."""
    labels = reader.labels
    by_name: dict[str, list[Axis]] = {}
    for axis in labels.axes:
        by_name.setdefault(axis.name, []).append(axis)
    for name, axes in by_name.items():
        single = {axis.dim == -1 for axis in axes} == {True} or name in reader.whole
        if name in reader.whole or (not single and any(axis.dim == -1 for axis in axes)):
            for axis in axes:
                labels.freeze(labels.axis(axis), f"{name} is used in several ways")
            continue
        first: dict[int, Axis] = {}
        for axis in axes:
            other = first.setdefault(axis.dim, axis)
            if (other.size, other.groups) != (axis.size, axis.groups):
                labels.freeze(labels.axis(axis), f"{name} is used in several ways")
                labels.freeze(labels.axis(other), f"{name} is used in several ways")
            elif other != axis:
                labels.merge(labels.axis(other), labels.axis(axis), "")


def _place_elements(reader: Reader) -> dict[Axis, Ids]:
    """Labels of every axis; weights labelled element by element get the dimension they vary in."""
    labels = reader.labels
    placed = {}
    for axis in labels.axes:
        ids = labels.axis(axis)
        if axis.dim >= 0:
            placed[axis] = ids
            continue
        shape = reader.shapes[axis.name]
        grid = labels.roots(ids).reshape(shape)
        dims = [d for d in range(len(shape)) if (grid != grid.take([0], axis=d)).any()]
        if len(dims) != 1 and labels.held[grid].all():
            continue  # its reason is told where it was frozen
        if len(dims) != 1:
            labels.freeze(ids, f"{axis.name} spreads it over {len(dims)} dimensions")
            continue
        lines = np.moveaxis(ids.reshape(shape), dims[0], 0).reshape(shape[dims[0]], -1)
        placed[Axis(axis.name, dims[0], shape[dims[0]], "follower")] = lines[:, 0]
    return placed


Part = tuple[Axis, str, np.ndarray[Any, np.dtype[np.bool_]]]


def _split_roles(reader: Reader, placed: Mapping[Axis, Ids], roots: Ids) -> list[Part]:
    """Return what every index of every axis does for its class: (axis, role, where)."""
    count = len(roots)
    required = np.zeros(count, bool)
    required[reader.labels.required_labels()] = True
    writes, must = np.zeros(count, bool), np.zeros(count, bool)
    for axis, ids in placed.items():
        if axis.role == "producer":
            writes[roots[ids]] = True
            must[roots[ids[required[ids]]]] = True
    parts: list[Part] = []
    for axis, ids in placed.items():
        everywhere = np.ones(len(ids), bool)
        if axis.role == "producer":
            is_producer = required[ids] | ~must[roots[ids]]
            parts += [(axis, "producer", is_producer), (axis, "gate", ~is_producer)]
        elif axis.role == "embedding":
            alone = ~writes[roots[ids]]
            parts += [(axis, "producer", alone), (axis, "follower", ~alone)]
        else:
            parts.append((axis, axis.role, everywhere))
    return [part for part in parts if part[2].any()]


def _kind(reader: Reader, unit: Unit, block_of_label: Ids) -> str:
    def holds(labels: list[Ids]) -> bool:
        return bool(np.isin(unit.blocks, block_of_label[np.concatenate([[0], *labels])]).all())

    if holds(reader.attended) and any(member.index.shape[1] > 1 for member in unit.producers):
        return "head"
    if any(len(reader.shapes[member.name]) > 2 for member in unit.producers):
        return "filter"
    return "width" if holds(reader.summed) else "neuron"


def _units(axes: Mapping[Axis, Ids], parts: list[Part], count: int) -> tuple[Unit, ...]:
    """Group blocks that look alike."""
    kinds: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    pairs = []
    for number, (axis, _, where) in enumerate(parts):
        index = np.flatnonzero(where & (axes[axis] >= 0))
        blocks = axes[axis][index]
        pairs.append((blocks, index))
        for block, times in zip(*np.unique(blocks, return_counts=True), strict=True):
            kinds[block].append((number, int(times)))
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for block, kind in enumerate(kinds):
        alike.setdefault(tuple(kind), []).append(block)
    units: list[Unit] = []
    used: dict[str, int] = {}
    for signature, blocks_of_unit in alike.items():
        place = np.full(count, -1, np.int64)
        place[blocks_of_unit] = np.arange(len(blocks_of_unit))
        members = []
        for number, _times in signature:
            axis, role, _where = parts[number]
            blocks, index = pairs[number]
            mine = place[blocks] >= 0
            rows = np.argsort(place[blocks[mine]], kind="stable")
            grid = index[mine][rows].reshape(len(blocks_of_unit), -1)
            members.append(Member(axis.name, axis.dim, role, grid, axis.groups))
        first = next(member.name for member in members if member.role == "producer")
        used[first] = used.get(first, 0) + 1
        name = first if used[first] == 1 else f"{first}#{used[first]}"
        units.append(Unit(name, np.asarray(blocks_of_unit), tuple(members)))
    return tuple(units)


def _left_out(
    reader: Reader,
    placed: Mapping[Axis, Ids],
    axes: Mapping[Axis, Ids],
    roots: Ids,
    frozen: Mapping[int, str],
) -> dict[str, str]:
    """Why (some of) the rows of a weight cannot go; weights that no layer reads are listed too."""
    found: dict[str, str] = {}
    for axis, ids in placed.items():
        alone = axes[axis] < 0
        if axis.role != "producer" or not alone.any():
            continue
        root = int(roots[ids[alone]][0])
        share = "" if alone.all() else f"{int(alone.sum())} of {axis.size} rows: "
        found[axis.name] = share + frozen.get(root, "nothing that can be removed writes it")
    known = {axis.name for axis in placed}
    elements = {axis.name: axis for axis in reader.labels.axes if axis.dim == -1}
    for name in reader.program.weights.values():
        if len(reader.shapes[name]) < 2 or name in known:
            continue
        reason = reader.unread.get(name)
        if reason is None and name in elements:
            reason = frozen.get(int(roots[reader.labels.axis(elements[name])[0]]))
        if reason is not None:
            found[name] = reason
    return found
