# SPDX-License-Identifier: Apache-2.0
"""Curve: a few layers pruned further and further, in the order in which their blocks entered.

The authors keep what entered Gamma first, and break ties by the norm of the weights; beside it
stand the norm alone, and chance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dessilbi.blocks.ticket import Ticket
from dessilbi.cuts.closing import close
from dessilbi.path.history import NEVER
from dessilbi.path.path import Path
from dessilbi.training import finetune as finetuning
from dessilbi.training.evaluation import accuracy, masked
from dessilbi.training.finetune import Trained
from dessilbi.training.recipes import FinetuneRecipe

By = Literal["entry", "magnitude", "random"]
BY: tuple[By, ...] = get_args(By)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class CurvePoint:
    """What is left once a share of the blocks of some layers is pruned.

    ``density`` is that of the closed ticket. Accuracies are those on the test split, as fractions:
    ``at_once`` with BatchNorm statistics re-estimated, ``fine_tuned`` after the fine-tune, if any.
    """

    order: By
    pruned: float
    density: float
    at_once: float
    fine_tuned: float | None


def names_of(path: Path, layers: Sequence[str]) -> list[str]:
    """Return the structured tensors that people mean by the names of layers.

    Raises:
        ValueError: One is unknown.
    """
    found = []
    for layer in (layer.strip() for layer in layers):
        name = next((n for n in (layer, f"{layer}.weight") if n in path.specs), None)
        if name is None:
            known = [each.removesuffix(".weight") for each in path.specs]
            close_to = get_close_matches(layer, known, n=1)
            meant = f"; did you mean {close_to[0]}?" if close_to else ""
            raise ValueError(
                f"{layer!r} is no structured layer of this run: it has {', '.join(known)}{meant}"
            )
        found.append(name)
    return list(dict.fromkeys(found))


def curve_of(
    trained: Trained,
    path: Path,
    names: Sequence[str],
    *,
    finetune: FinetuneRecipe | None,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
) -> list[CurvePoint]:
    """Prune layers by each share in each order, judge what is left, and fine-tune it.

    Layers that were trained as one unit are pruned as one.

    Args:
        trained: The run, loaded.
        path: Its path.
        names: Of the structured tensors to prune.
        finetune: How; None: not at all.
        shares: Of the blocks of each layer to prune; a layer always keeps one block.
        seed: Of the random order.

    Raises:
        ValueError: The run left no scores.
    """
    example = trained.data.train.examples(1)[0]
    points = []
    for by in BY:
        best = {name: _best_first(path, name, by, seed) for name in names}
        for share in shares:
            ticket = close(_pruned(path, best, share), trained.model, example_inputs=example)
            net = masked(trained.model, ticket, trained.data.train)
            points.append(
                CurvePoint(
                    by,
                    share,
                    ticket.density,
                    accuracy(net, trained.data.test),
                    None if finetune is None else _tuned(trained, ticket, finetune),
                )
            )
    return points


def _tuned(trained: Trained, ticket: Ticket, settings: FinetuneRecipe) -> float:
    return accuracy(finetuning.finetune(trained, ticket, settings), trained.data.test)


def _best_first(path: Path, name: str, by: By, seed: int) -> npt.NDArray[Any]:
    """The blocks of a tensor, those to keep first."""
    spec = path.specs[name]
    if by == "random":
        unit = path.units[name]  # members of a unit draw alike
        words = [seed, *(unit or name).encode()]
        return np.random.default_rng(words).permutation(spec.num_blocks)
    norms = -_flat(path.scores()["weight"], name)
    if by == "magnitude":
        return np.argsort(norms, kind="stable")
    entries = _flat(path.entry(), name).astype(np.int64)
    entries[entries == NEVER] = np.iinfo(np.int64).max
    return np.lexsort((norms, entries))


def _flat(values: Mapping[str, Tensor], name: str) -> npt.NDArray[Any]:
    return values[name].reshape(-1).numpy().copy()


def _pruned(path: Path, best: Mapping[str, npt.NDArray[Any]], share: float) -> Ticket:
    units = {path.units[name]: name for name in best if path.units[name] is not None}
    masks = {}
    for name, spec in path.specs.items():
        order = best.get(name, best.get(units.get(path.units[name], "")))
        flat = torch.ones(spec.num_blocks, dtype=torch.bool)
        if order is not None and len(order) == spec.num_blocks:
            gone = min(int(share * len(order) + 1e-9), len(order) - 1)
            flat[torch.from_numpy(order[len(order) - gone :])] = False
        masks[name] = flat.reshape(spec.grid)
    return Ticket(masks, path.specs, {"kind": "pruned", "share": share})
