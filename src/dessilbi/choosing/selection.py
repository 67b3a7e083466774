# SPDX-License-Identifier: Apache-2.0
"""Selection: one ranking of all blocks, and tickets of any wanted density as its prefixes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dessilbi.blocks.ticket import TensorSpec, Ticket

# A ticket keeps of every layer at least this share of its own density (and one block).
LAYER_FLOOR = 0.05

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ranking:
    """All blocks of a run in the order in which a growing ticket takes them.

    An *item* is a block of an independent tensor, or the blocks of all members of a unit at one
    position: what lives or dies together is taken together. Prefixes of the order are nested, so
    the tickets of one ranking are a nested family.

    Args:
        specs: name -> shape and block of the structured tensors.
        tensor_of: For each item in order, which leader (see ``leaders``) it belongs to.
        block_of: For each item in order, the flat index of its block.
        elements: For each item in order, its number of elements.
        leaders: Per leader, the names of the tensors that share its items.
    """

    specs: Mapping[str, TensorSpec]
    leaders: Sequence[Sequence[str]]
    tensor_of: Ints
    block_of: Ints
    elements: Ints

    def __len__(self) -> int:
        """Number of items."""
        return len(self.elements)

    def ticket(self, density: float, origin: Mapping[str, Any]) -> Ticket:
        """Return the largest ticket whose density is at most ``density``.

        Raises:
            ValueError: The density is not in (0, 1], or too small for a single block.
        """
        if not 0 < density <= 1:
            raise ValueError(f"density={density!r} is not allowed: it must be in (0, 1]")
        total = int(self.elements.sum())
        taken = np.cumsum(self.elements)
        # The tiny allowance keeps 0.3 * 10 from falling short of 3.
        count = int(np.searchsorted(taken, density * total * (1 + 1e-12), side="right"))
        if count == 0:
            smallest = self.elements[0] / total if total else 1.0
            raise ValueError(
                f"density={density!r} is less than one block: "
                f"the smallest ticket of this order has density {smallest:.3g}"
            )
        return self.prefix(count, origin)

    def prefix(self, count: int, origin: Mapping[str, Any]) -> Ticket:
        """Return the ticket of the first ``count`` items.

        Raises:
            ValueError: The count is not from 1 to the number of items.
        """
        if not 1 <= count <= len(self):
            raise ValueError(f"count={count!r} is not allowed: it must be from 1 to {len(self)}")
        flat = {
            name: torch.zeros(spec.num_blocks, dtype=torch.bool)
            for name, spec in self.specs.items()
        }
        for index, names in enumerate(self.leaders):
            blocks = torch.from_numpy(self.block_of[:count][self.tensor_of[:count] == index])
            for name in names:
                flat[name][blocks] = True
        masks = {name: flat[name].reshape(spec.grid) for name, spec in self.specs.items()}
        return Ticket(masks, self.specs, origin)


def rank(
    keys: Sequence[Mapping[str, Tensor]],
    specs: Mapping[str, TensorSpec],
    units: Mapping[str, str | None],
    *,
    floor: float = LAYER_FLOOR,
    relative: bool = False,
) -> Ranking:
    """Rank all blocks by ``keys``, highest first, letting no layer die.

    The order is global over all layers, except that at every prefix of density d each layer keeps
    its best block and at least ``floor * d`` of its elements (as far as blocks and d allow).

    Args:
        keys: Scores per block, the first decides, later ones break ties. Members of a unit have
            the same scores.
        specs: name -> shape and block.
        units: name -> unit name, or None.
        floor: See above; 0 only keeps each layer's best block.
        relative: Divide every score by the mean over its layer (over its unit), so that layers of
            different scales can be compared.

    Returns:
        The ranking.

    Raises:
        ValueError: No tensor has elements, or a score is not finite.
    """
    leaders = leaders_of(specs, units)
    if not leaders:
        raise ValueError("no structured tensor has elements, so there is nothing to rank")
    tensor_of = np.concatenate(
        [np.full(specs[names[0]].num_blocks, i) for i, names in enumerate(leaders)]
    )
    block_of = np.concatenate([np.arange(specs[names[0]].num_blocks) for names in leaders])
    elements = np.concatenate(
        [
            np.full(specs[names[0]].num_blocks, sum(specs[name].block_size for name in names))
            for names in leaders
        ]
    )
    columns = [
        -np.concatenate([_numbers(key, names[0], relative=relative) for names in leaders])
        for key in reversed(keys)
    ]
    # lexsort is stable: equal blocks stay in the order of the tensors.
    order = np.lexsort(columns)
    tensor_of, block_of, elements = tensor_of[order], block_of[order], elements[order]
    raised = np.argsort(_with_floor(tensor_of, elements, len(leaders), floor), kind="stable")
    return Ranking(specs, leaders, tensor_of[raised], block_of[raised], elements[raised])


def leaders_of(specs: Mapping[str, TensorSpec], units: Mapping[str, str | None]) -> list[list[str]]:
    """Return the tensors that are ranked as one: members of a unit together, others alone."""
    together: dict[object, list[str]] = {}
    for name in specs:
        unit = units.get(name)
        together.setdefault(("tensor", name) if unit is None else ("unit", unit), []).append(name)
    # A tensor of size zero has blocks to index but nothing to keep; it takes part in no ranking.
    return [names for names in together.values() if specs[names[0]].num_blocks > 0]


def _numbers(key: Mapping[str, Tensor], name: str, *, relative: bool) -> Floats:
    numbers: Floats = key[name].detach().reshape(-1).cpu().to(torch.float64).numpy()
    if not np.isfinite(numbers).all():
        raise ValueError(
            f"the blocks of {name} cannot be ranked, because their weights or V are not finite: "
            f"the training has diverged; go back to a checkpoint, or lower the lr"
        )
    mean = float(numbers.mean()) if relative else 1.0
    return numbers / mean if mean > 0 else numbers


def _with_floor(tensor_of: Ints, elements: Ints, num_leaders: int, floor: float) -> Floats:
    """The density at which each item, in its present order, joins the family."""
    joins = np.cumsum(elements) / max(int(elements.sum()), 1)
    # Raising blocks adds at most this floor to the density, so the promise holds for the sum.
    floor = floor / (1 - floor)
    for index in range(num_leaders):
        own = np.flatnonzero(tensor_of == index)
        share = np.cumsum(elements[own]) / max(int(elements[own].sum()), 1)
        if floor > 0:
            joins[own] = np.minimum(joins[own], share / floor)
        joins[own[0]] = 0.0
    return joins
