# SPDX-License-Identifier: Apache-2.0
"""Widening: which indices of every tensor come again when units get wider, as plain values.

A new block lies where a copy of the last block of its unit would lie: right behind it, in every
tensor. So the same cuts that say what stays of a tensor say how it grows: an index that comes again
is new. Compaction and growth share all that follows from them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import torch
from torch import Tensor

from dessilbi.blocks.structure import extent, indices, owners
from dessilbi.blocks.ticket import TensorSpec
from dessilbi.cuts.closing import settle
from dessilbi.cuts.cutting import Cut, Cuts, cut_tensor
from dessilbi.graph import Graph, Unit, why_alone
from dessilbi.graph.labels import Ids

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Change:
    """New widths of some units, and what they mean for every tensor.

    Args:
        widths: Unit -> (blocks before, blocks after), for units that change.
        cuts: Indices of every tensor that changes; those that come again are new.
        rows: Tensor -> boolean mask in its new shape: entries of new blocks themselves.
        columns: Likewise entries of old blocks that read new blocks.
    """

    widths: Mapping[str, tuple[int, int]]
    cuts: Cuts
    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]

    @property
    def born(self) -> dict[str, Tensor]:
        """Tensor -> mask of all that is new in it."""
        found = dict(self.rows)
        for name, mask in self.columns.items():
            found[name] = found[name] | mask if name in found else mask
        return found


def widths_of(graph: Graph) -> dict[str, int]:
    """Return unit -> number of its blocks.

    >>> from torch import nn
    >>> from dessilbi.graph import read_graph
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> widths_of(read_graph(net, torch.ones(1, 4)))
    {'0.weight': 8}
    """
    return {unit.name: unit.num_blocks for unit in graph.units}


def unit_of(graph: Graph, name: str) -> Unit:
    """Return the unit of that name, or the one a layer or parameter of that name writes.

    Raises:
        ValueError: There is none, or several; the reason is named.
    """
    for unit in graph.units:
        if unit.name == name:
            return unit
    known = {name, f"{name}.weight"}
    for roles in (("producer",), ("gate", "follower")):
        found = [
            u for u in graph.units if any(m.name in known and m.role in roles for m in u.members)
        ]
        if len(found) > 1:
            raise ValueError(
                f"{name} writes {len(found)} units: name one of {', '.join(u.name for u in found)}"
            )
        if found:
            return found[0]
    units = [unit.name for unit in graph.units]
    weight = next((n for n in (f"{name}.weight", name) if n in graph.shapes), None)
    if weight is not None:
        raise ValueError(
            f"{name} has no width that can change ({why_alone(graph, weight)}): choose among "
            f"{_few(units)}"
        )
    meant = get_close_matches(name, [*units, *(u.removesuffix(".weight") for u in units)], n=1)
    hint = f"; did you mean {meant[0]}?" if meant else ""
    raise ValueError(f"there is no unit or layer {name!r}: choose among {_few(units)}{hint}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "(no units)"


def find_change(graph: Graph, sizes: Sizes, *, narrower: bool = False) -> Change:
    """Return what new widths mean.

    Args:
        graph: The graph of the model.
        sizes: Unit, layer or parameter -> new width, in blocks (filters, neurons, heads).
        narrower: Whether widths may also shrink, to the first blocks of a unit.

    Raises:
        ValueError: A name is unknown, a width is not allowed, or tensors would become uneven.
    """
    wanted: dict[str, tuple[str, int]] = {}
    times = np.ones(graph.num_blocks + 1, np.int64)  # the last one stands for "always there"
    for name, width in sizes.items():
        unit = unit_of(graph, name)
        if type(width) is not int or width < 1:
            raise ValueError(
                f"the width {width!r} of {name} is not allowed: give a whole number >= 1"
            )
        told, other = wanted.setdefault(unit.name, (name, width))
        if other != width:
            raise ValueError(
                f"{told} and {name} are one unit and get wider together: {other} and {width} do "
                f"not agree, give one width"
            )
        if width < unit.num_blocks and not narrower:
            raise ValueError(
                f"{name} has {unit.num_blocks} blocks and cannot grow to {width}: give "
                f"{unit.num_blocks} or more, or use compact to make it smaller"
            )
        _set_times(graph, unit, width, times)
    changed = {u.name: (u.num_blocks, wanted[u.name][1]) for u in graph.units if u.name in wanted}
    changed = {name: widths for name, widths in changed.items() if widths[0] != widths[1]}
    _check_shapes(graph, times)
    return _change(graph, times, changed)


def _set_times(graph: Graph, unit: Unit, width: int, times: Ids) -> None:
    """Write down how often each block of a unit comes, evenly over the groups it belongs to."""
    groups = graph.even_groups(unit)
    if (width - unit.num_blocks) % len(groups):
        raise ValueError(
            f"{unit.name} feeds or leaves a grouped convolution, whose {len(groups)} groups stay "
            f"even: {unit.num_blocks} can change by multiples of {len(groups)}, not to {width}"
        )
    more = (width - unit.num_blocks) // len(groups)
    for group in groups:
        blocks = unit.blocks[group]
        if more >= 0:
            times[blocks[-1]] = 1 + more
        else:
            times[blocks[more:]] = 0
        if not times[blocks].any():
            raise ValueError(f"{unit.name} cannot have a width of {width}: nothing would be left")


def _check_shapes(graph: Graph, times: Ids) -> None:
    """Refuse what would not be rectangular, and norms that new channels would move."""
    gone = times[:-1] == 0
    if gone.any() and not np.array_equal(settle(graph, gone).gone, gone):
        raise ValueError("these widths leave a tensor uneven: change the units concerned together")
    for rect in graph.rects:
        grid = times[rect.blocks]
        product = np.ones(grid.shape, np.int64)
        for dim in range(grid.ndim):
            others = tuple(d for d in range(grid.ndim) if d != dim)
            product *= grid.min(axis=others, keepdims=True)
        if (grid > 1).any() and not np.array_equal(product, grid):
            raise ValueError(f"{rect.node} would not stay rectangular: grow whole rows of it")
    for unit in graph.units:
        scaled = [m.name for m in unit.followers if m.name in graph.reading.rescaled]
        if scaled and (times[unit.blocks] > 1).any():
            raise ValueError(
                f"{unit.name} cannot get wider: {scaled[0]} takes its mean square over it, and "
                f"new channels would change it"
            )


def _change(graph: Graph, times: Ids, widths: Mapping[str, tuple[int, int]]) -> Change:
    found: dict[tuple[str, int], tuple[Cut, bool]] = {}
    for axis, blocks in graph.axes.items():
        if (times[blocks] != 1).any():
            cut = Cut(axis.name, axis.dim, axis.size, _spread(blocks, times), axis.groups)
            reads = axis.role == "consumer"
            known = found.get((axis.name, axis.dim))
            found[axis.name, axis.dim] = (cut, reads if known is None else reads and known[1])
    cuts: dict[str, tuple[Cut, ...]] = {}
    for name in sorted({name for name, _ in found}):
        cuts[name] = tuple(cut for (n, _), (cut, _) in sorted(found.items()) if n == name)
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for name, own in cuts.items():
        shape = graph.shapes[name]
        written = tuple(cut for cut in own if not found[name, cut.dim][1])
        rows[name] = _new_along(shape, own, written)
        columns[name] = _new_along(shape, own, own) & ~rows[name]
    return Change(widths, cuts, _some(rows), _some(columns))


def _some(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: mask for name, mask in masks.items() if bool(mask.any())}


def _spread(blocks: Ids, times: Ids) -> Ids:
    """Return the indices of an axis, each run of a block as often as the block comes."""
    runs = np.split(np.arange(len(blocks)), np.flatnonzero(np.diff(blocks)) + 1)
    return np.concatenate([np.tile(run, times[blocks[run[0]]]) for run in runs])


def is_new(index: Ids) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return which entries of an index have come before.

    >>> is_new(np.array([0, 1, 2, 1, 2, 3])).tolist()
    [False, False, False, True, True, False]
    """
    found = np.ones(len(index), bool)
    found[np.unique(index, return_index=True)[1]] = False
    return found


def _new_along(shape: tuple[int, ...], own: tuple[Cut, ...], along: tuple[Cut, ...]) -> Tensor:
    """Return what is new in a tensor along some of its cuts, in its new shape."""
    sizes = list(shape)
    for cut in own:
        sizes[cut.dim] = len(cut.index) // cut.groups
    mask = torch.zeros(sizes, dtype=torch.bool)
    for cut in along:
        if cut.groups == 1:
            flags = torch.from_numpy(is_new(cut.index))
            mask |= flags.reshape([-1 if d == cut.dim else 1 for d in range(len(shape))])
            continue
        # Every group of rows has columns of its own: number them, and see which come again.
        numbers = torch.arange(cut.size).reshape(cut.groups, 1, -1)
        grid = numbers.expand(-1, shape[0] // cut.groups, -1).reshape(shape[0], -1)
        moved = cut_tensor(grid, own[:2])
        again = np.stack([is_new(row) for row in moved.numpy()])
        mask |= torch.from_numpy(again).reshape(*again.shape, *[1] * (len(shape) - 2))
    return mask


def block_takes(spec: TensorSpec, cuts: tuple[Cut, ...], *, name: str) -> tuple[list[int], ...]:
    """Return, per dimension of the grid, which block each block was before; -1: it is new.

    Raises:
        ValueError: Blocks would be torn: they do not come or go as a whole.

    >>> spec = TensorSpec(shape=(4, 3), block=(2, None))
    >>> block_takes(spec, (Cut("w", 0, 4, np.array([0, 1, 2, 3, 2, 3])),), name="w")
    ([0, 1, -1], [0])
    """
    takes: list[list[int]] = [list(range(count)) for count in spec.grid]
    for cut in cuts:
        length = spec.block[cut.dim]
        if length is None:
            continue
        lines = _lines(cut, length)
        if lines is None:
            raise ValueError(
                f"{name} has blocks of {spec.block}, which new widths would tear: train it with "
                f"filters, neurons or single weights, or grow without optimizer="
            )
        takes[cut.dim] = lines
    return tuple(takes)


def takes_of(specs: Mapping[str, TensorSpec], cuts: Cuts) -> dict[str, tuple[list[int], ...]]:
    """Return :func:`block_takes` of every tensor, by name.

    Raises:
        ValueError: Blocks of one would be torn.
    """
    return {n: block_takes(spec, cuts.get(n, ()), name=n) for n, spec in specs.items()}


def _lines(cut: Cut, length: int | tuple[int, ...]) -> list[int] | None:
    """Return which block each block was, -1: it is new; None: one is torn."""
    if cut.groups > 1 or len(cut.index) % extent(length, len(cut.index)):
        return None
    places = indices(length, len(cut.index)).numpy()
    runs, new = cut.index[places], is_new(cut.index)[places]
    before = owners(length, cut.size).numpy()[runs[:, 0]]
    whole = (runs == indices(length, cut.size).numpy()[before]).all(axis=1)
    if not np.where(whole, ~new.any(axis=1), False)[~new.all(axis=1)].all():
        return None
    found: list[int] = np.where(new.all(axis=1), -1, before).tolist()
    return found
