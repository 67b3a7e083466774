# SPDX-License-Identifier: Apache-2.0
"""Widths: how a recipe lets a network grow, the rule that says by how much, and what it may cost.

The rule is the authors': where the share of a layer's blocks in supp(Gamma) reaches a threshold,
all of them are wanted, and the layer gets more.
"""

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from math import prod
from typing import Any, TypeVar

from torch import nn

from dessilbi.blocks.naming import tensor_names, unwrap
from dessilbi.graph import Graph
from dessilbi.growth.widening import Change, find_change
from dessilbi.training.growth_table import GrowRecipe

T = TypeVar("T")


def layer_of(unit: str) -> str:
    """Return a unit's name as people say it.

    >>> layer_of("stage1.0.conv1.weight"), layer_of("conv1.weight#2")
    ('stage1.0.conv1', 'conv1#2')
    """
    name, mark, number = unit.partition("#")
    return name.removesuffix(".weight") + mark + number


def chosen(told: T | Mapping[str, T] | None, unit: str) -> T | None:
    """Return what an option says for a unit: the first glob that matches decides."""
    if not isinstance(told, Mapping):
        return told
    return next((v for glob, v in told.items() if fnmatchcase(layer_of(unit), glob)), None)


def start_of(graph: Graph, options: GrowRecipe) -> dict[str, int]:
    """Return unit -> width at the start; layers that no glob names keep theirs.

    Raises:
        ValueError: A glob matches no layer, or a cap is below the start.
    """
    units = [unit.name for unit in graph.units]
    if not units:
        raise ValueError("no layer of this model can change its width: train it as it is")
    _check_globs(options, [layer_of(name) for name in units])
    widths = {}
    for unit in graph.units:
        width = chosen(options.start, unit.name)
        widths[unit.name] = unit.num_blocks if width is None else width
        cap = chosen(options.max_width, unit.name)
        if cap is not None and cap < widths[unit.name]:
            raise ValueError(
                f"grow.max_width={cap} is below the start of {layer_of(unit.name)}, "
                f"{widths[unit.name]}: raise it or start narrower"
            )
    return widths


def _check_globs(options: GrowRecipe, layers: Iterable[str]) -> None:
    known = list(layers)
    for field in ("start", "share", "step", "max_width"):
        told = getattr(options, field)
        for glob in told if isinstance(told, Mapping) else ():
            if not any(fnmatchcase(layer, glob) for layer in known):
                raise ValueError(
                    f"grow.{field} names {glob!r}, which matches no layer that can grow: those are "
                    f"{', '.join(known)}"
                )


def check_caps(options: GrowRecipe, params: int, macs: int) -> None:
    """Refuse a start that costs more than the caps allow.

    Raises:
        ValueError: It does.
    """
    for name, cap, cost in (
        ("max_params", options.max_params, params),
        ("max_macs", options.max_macs, macs),
    ):
        if cap is not None and cost > cap:
            raise ValueError(
                f"grow.{name}={cap} is below the start, which has {cost}: raise it or start "
                f"narrower"
            )


def wanted(graph: Graph, options: GrowRecipe, shares: Mapping[str, float]) -> dict[str, int]:
    """Return unit -> new width, for units that the rule widens, within their own caps.

    Args:
        graph: Of the model as it is.
        options: The recipe's.
        shares: Unit -> share of its blocks in supp(Gamma).
    """
    widths = {}
    for unit in graph.units:
        threshold, now = chosen(options.share, unit.name), unit.num_blocks
        if chosen(options.start, unit.name) is None:
            continue
        if threshold is None or shares.get(unit.name, 0.0) < threshold:
            continue
        even = len(graph.even_groups(unit))
        more = max(chosen(options.step, unit.name) or 1, math.floor(options.factor * now) - now)
        more = -(-more // even) * even
        cap = chosen(options.max_width, unit.name)
        if cap is not None:
            more = min(more, (cap - now) // even * even)
        if more > 0:
            widths[unit.name] = now + more
    return widths


def within(
    graph: Graph,
    model: nn.Module,
    options: GrowRecipe,
    widths: Mapping[str, int],
    *,
    macs: int,
) -> Change | None:
    """Return the change to these widths, or to as much of it as the caps allow; None: to nothing.

    What is too much is halved, in all layers alike, until it fits. ``macs`` are those of a sample
    now, with what no weight does, which stays.
    """
    others = macs - costs_after(graph, model, find_change(graph, {}))[1]
    known = {unit.name: unit for unit in graph.units}
    more = {name: width - known[name].num_blocks for name, width in widths.items()}
    while any(more.values()):
        sizes = {name: known[name].num_blocks + n for name, n in more.items() if n}
        change = find_change(graph, sizes)
        params, after = costs_after(graph, model, change)
        too_many = options.max_params is not None and params > options.max_params
        too_much = options.max_macs is not None and after + others > options.max_macs
        if not (too_many or too_much):
            return change
        even = {name: len(graph.even_groups(known[name])) for name in more}
        more = {name: n // 2 // even[name] * even[name] for name, n in more.items()}
    return None


def costs_after(graph: Graph, model: nn.Module, change: Change) -> tuple[int, int]:
    """Return parameters, and the multiply-accumulates that weights do for one sample."""
    model = unwrap(model)
    names = tensor_names(model)
    params = 0
    sizes: dict[str, tuple[int, int]] = {}
    for own, param in model.named_parameters():
        shape = list(param.shape)
        for cut in change.cuts.get(names[own], ()):
            shape[cut.dim] = len(cut.index) // cut.groups
        sizes[names[own]] = param.numel(), prod(shape)
        params += prod(shape)
    macs = sum(count * sizes[name][1] // sizes[name][0] for name, count in graph.macs.items())
    return params, macs // graph.reading.batch


def plain(widths: Mapping[str, Any]) -> dict[str, Any]:
    """Return layer -> value for unit -> value."""
    return {layer_of(name): value for name, value in widths.items()}
