# SPDX-License-Identifier: Apache-2.0
"""Choosing: the family of closed tickets of one ranking, and the largest within a budget.

Costs are those of the compacted model, so a budget speaks about what will be on disk and run, not
about zeros in a mask.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dessilbi.blocks.ticket import TensorSpec, Ticket
from dessilbi.choosing.selection import Ranking, rank
from dessilbi.cuts.closing import close_on
from dessilbi.cuts.costs import Cost, CostModel
from dessilbi.graph import Graph, read_graph
from dessilbi.graph.coupling import couplings
from dessilbi.graph.labels import Ids
from dessilbi.graph.program import ExampleInputs

Quantity = Literal["density", "params", "macs", "bytes"]
QUANTITIES: tuple[Quantity, ...] = ("density", "params", "macs", "bytes")


@dataclass(frozen=True)
class Choice:
    """One member of a family: its closed ticket, what it costs, and why it was chosen."""

    ticket: Ticket
    cost: Cost
    count: int
    reason: str


class Family:
    """The nested closed tickets of one ranking, from the smallest to the whole model.

    Member ``count`` keeps the first ``count`` items of the ranking, closed so that it can be
    compacted; the first items are the best of every layer, so no layer dies. What the graph says
    can only be removed together is ranked together (root of the summed squares), and around
    grouped convolutions blocks come evenly from all groups.

    Args:
        keys: Scores per block by tensor, the first decides, later ones break ties.
        specs: Shape and block of each structured tensor.
        units: Names of the units the run was trained with, or None per tensor.
        model: The model; it is not changed.
        example_inputs: A tensor, a tuple of forward's arguments, or a dict of its keywords.
        relative: As in :func:`dessilbi.choosing.selection.rank`.
        origin: Goes into every ticket's origin.

    Raises:
        ValueError: The scores are of another model, or the model cannot be read.
    """

    def __init__(
        self,
        keys: list[Mapping[str, Tensor]],
        specs: Mapping[str, TensorSpec],
        units: Mapping[str, str | None],
        *,
        model: nn.Module,
        example_inputs: ExampleInputs,
        relative: bool = False,
        origin: Mapping[str, Any] | None = None,
    ):
        full = Ticket({n: torch.ones(s.grid, dtype=torch.bool) for n, s in specs.items()}, specs)
        full.density_of_model(model)  # checks names and shapes
        self.graph = read_graph(model, example_inputs)
        self.costs = CostModel(self.graph, model)
        together = together_on(self.graph, specs, units)
        even = [evened(self.graph, joint_scores(key, together), specs) for key in keys]
        self._ranking: Ranking = rank(even, specs, together, relative=relative)
        self._origin = dict(origin or {})
        self._members: dict[int, tuple[Ticket, Cost]] = {}

    def __len__(self) -> int:
        """Number of members."""
        return len(self._ranking)

    @cached_property
    def smallest(self) -> int:
        """The first member of which closing leaves something of every layer.

        Budgets choose from here on: below it a layer would be dead that nobody asked to die.
        """
        low, high = len(self._ranking.leaders), len(self)
        if not self._is_alive(high):  # something can only be dead
            return low
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._is_alive(middle) else (middle + 1, high)
        return low

    def _is_alive(self, count: int) -> bool:
        ticket, _ = self.member(count)
        return all(bool(ticket[name].any()) for names in self._ranking.leaders for name in names)

    def member(self, count: int) -> tuple[Ticket, Cost]:
        """Return the closed ticket of the first ``count`` items and its cost."""
        if count not in self._members:
            ticket = close_on(self.graph, self._ranking.prefix(count, self._origin))
            self._members[count] = ticket, self.costs.of(ticket)
        return self._members[count]

    def measure(self, quantity: Quantity) -> Callable[[int], float]:
        """Return the function from the number of a member to a quantity of it."""
        if quantity == "density":
            return lambda count: self.member(count)[0].density
        return lambda count: float(getattr(self.member(count)[1], quantity))

    def within(
        self, limit: float, measured: Callable[[int], float], *, what: str
    ) -> tuple[int, float]:
        """Return the largest member whose measure is at most ``limit``, and its measure.

        ``measured`` takes the number of a member and should grow with it.

        Raises:
            ValueError: Even the smallest member exceeds it; the message names its measure.
        """
        low, high = self.smallest, len(self)
        smallest = measured(low)
        if smallest > limit:
            raise ValueError(
                f"{what} of at most {limit:,.6g} cannot be met: the smallest ticket of this run "
                f"has {smallest:,.6g}; ask for at least that"
            )
        while low < high:  # the largest prefix that fits; costs grow with the prefix
            middle = (low + high + 1) // 2
            low, high = (middle, high) if measured(middle) <= limit else (low, middle - 1)
        return low, measured(low)

    def choose(self, quantity: Quantity, limit: float) -> Choice:
        """Return the largest member within a budget, met from below to within one item.

        Args:
            quantity: "density" (share of the structured elements), "params", "macs" or "bytes".
            limit: For density a share in (0, 1]; else a share of the dense model's if at most 1,
                an absolute number if above.

        Raises:
            ValueError: The limit is out of range or below the smallest member.
        """
        if quantity not in QUANTITIES:
            raise ValueError(f"{quantity!r} is not a budget: use one of {', '.join(QUANTITIES)}")
        if not 0 < limit < inf or (quantity == "density" and limit > 1):
            allowed = "in (0, 1]" if quantity == "density" else "above 0, and finite"
            raise ValueError(f"{quantity}={limit!r} is not allowed: it must be {allowed}")
        absolute, share = limit, ""
        if quantity != "density" and limit <= 1:
            dense = getattr(self.costs.dense, quantity)
            absolute, share = limit * dense, f" ({limit:.4g} of {dense:,})"
        count, value = self.within(absolute * (1 + 1e-12), self.measure(quantity), what=quantity)
        ticket, cost = self.member(count)
        told = f"{value:.4g}" if quantity == "density" else f"{value:,.0f}"
        reason = (
            f"the largest ticket with {quantity} <= {absolute:,.6g}{share}: it has {told}, "
            f"item {count:,} of {len(self):,} by {self._origin.get('order', 'score')}"
        )
        return Choice(ticket, cost, count, reason)


def together_on(
    graph: Graph, specs: Mapping[str, TensorSpec], units: Mapping[str, str | None]
) -> dict[str, str | None]:
    """Units of the run, and what the graph couples where the run's blocks are its blocks."""
    found = couplings(graph)
    result: dict[str, str | None] = {}
    for name, spec in specs.items():
        coupling = found.get(name)
        fits = coupling is not None and spec.grid == TensorSpec(spec.shape, coupling.structure).grid
        result[name] = f"graph: {coupling.unit}" if coupling and fits else units.get(name)
    return result


def joint_scores(
    key: Mapping[str, Tensor], together: Mapping[str, str | None]
) -> dict[str, Tensor]:
    """Give members of a unit one score: the root of their summed squares, or the first entry."""
    result = dict(key)
    units: dict[str, list[str]] = {}
    for name, unit in together.items():
        if unit is not None:
            units.setdefault(unit, []).append(name)
    for names in units.values():
        scores = torch.stack([key[name].reshape(-1) for name in names])
        if bool((scores == scores[0]).all()):  # trained as a unit: the scores are joint already
            continue
        entries = not scores.is_floating_point()
        joint = scores.amax(0) if entries else scores.double().square().sum(0).sqrt()
        for name in names:
            result[name] = joint.reshape(key[name].shape)
    return result


def evened(
    graph: Graph, key: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]
) -> dict[str, Tensor]:
    """Let the j-th best blocks of all groups of a grouped convolution share their mean score.

    They are neighbours in the ranking then, so that what a prefix leaves out is even.
    """
    result = dict(key)
    for unit in graph.units:
        groups = graph.even_groups(unit)
        for member in unit.producers:
            spec = specs.get(member.name)
            in_order = (member.index.ravel() == np.arange(member.index.size)).all()
            if len(groups) > 1 and spec and in_order and spec.num_blocks == unit.num_blocks:
                result[member.name] = _shared(result[member.name], groups)
    return result


def _shared(scores: Tensor, groups: list[Ids]) -> Tensor:
    flat = scores.double().reshape(-1).clone()
    ranked = []
    for group in groups:
        places = torch.from_numpy(group)
        ranked.append(places[flat[places].argsort(descending=True, stable=True)])
    for place in range(max(len(best) for best in ranked)):
        chosen = torch.stack([best[place] for best in ranked if place < len(best)])
        flat[chosen] = flat[chosen].mean()
    return flat.reshape(scores.shape)
