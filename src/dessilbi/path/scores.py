# SPDX-License-Identifier: Apache-2.0
"""Scores: how much each block weighs, ||V||/lam and ||W||, and their file."""

import math
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor
from torch.optim import Optimizer

from dessilbi.blocks import sharding
from dessilbi.blocks.ticket import TensorSpec
from dessilbi.files.storage import DamagedFileError, write_atomic
from dessilbi.files.tensorfiles import load_tensors
from dessilbi.optimizers import dual
from dessilbi.path.history import NEVER

Scores = Mapping[str, Mapping[str, Tensor]]
Order = Literal["relative", "weight", "dual", "entry"]
ORDERS: tuple[Order, ...] = ("relative", "weight", "dual", "entry")
KINDS = ("dual", "weight")
KIND_OF = {"relative": "weight", "weight": "weight", "dual": "dual", "entry": "dual"}


@torch.no_grad()
def block_scores(optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return {"dual": ||V||/lam, "weight": ||W||} per block, by name, on the CPU.

    Members of a unit share the norms over the unit. Where every lam is infinite, "dual" is ||V||
    by itself (divided by sqrt(|u|) under block_scale "sqrt").

    Raises:
        ValueError: No group has a structure, or the parameters have no names.
    """
    found = dual.named_members(optimizer)
    unbounded = all(math.isinf(member.lam) for member in found)
    scores: dict[str, dict[str, Tensor]] = {"dual": {}, "weight": {}}
    units = dual.units_of(found)
    for unit, norms in zip(units, dual.norms_of(optimizer, units), strict=True):
        share = norms / dual.threshold(unit, 1.0 if unbounded else None)
        weights = sharding.norms(
            [m.param.detach().to(dual.dual_dtype(m.param)) for m in unit],
            [m.block for m in unit],
        )
        joint = torch.stack([w.reshape(-1).double() for w in weights]).square().sum(0).sqrt()
        for member, own in zip(unit, weights, strict=True):
            weight = own if len(unit) == 1 else joint.reshape(member.grid).to(own.dtype)
            # Clones: members of a unit must not share memory, or they cannot be saved.
            scores["dual"][member.name] = share.reshape(member.grid).cpu().clone()
            scores["weight"][member.name] = weight.cpu().clone()
    return scores


def save_scores(scores: Scores, file: str | FilePath) -> None:
    """Write scores as one safetensors file."""
    flat = {
        f"{kind}/{name}": values.contiguous()
        for kind, named in scores.items()
        for name, values in named.items()
    }
    write_atomic(file, safetensors.torch.save(flat))


def load_scores(
    file: str | FilePath, specs: Mapping[str, TensorSpec]
) -> dict[str, dict[str, Tensor]]:
    """Read scores of the tensors in ``specs``.

    Raises:
        DamagedFileError: The file is damaged or of another run.
    """
    try:
        flat = load_tensors(file)
        scores = {kind: {name: flat[f"{kind}/{name}"] for name in specs} for kind in KINDS}
    except LookupError as error:
        raise DamagedFileError(
            f"{file} is not readable as block scores ({error}): restore it or train again"
        ) from None
    for named in scores.values():
        for name, spec in specs.items():
            if tuple(named[name].shape) != spec.grid or not named[name].is_floating_point():
                raise DamagedFileError(f"{file} holds scores of another run: {name} does not fit")
    return scores


def usual_order(specs: Mapping[str, TensorSpec]) -> Order:
    """Return the order for who asks for none.

    "weight" where all blocks are single weights, "relative" where none are, since norms of filters
    and neurons say more about the layer than about the filter; see docs/adr/0014. Where both are
    to be compared only lambda says how: "dual".
    """
    single = {spec.block_size == 1 for spec in specs.values()}
    return "dual" if len(single) > 1 else "weight" if single == {True} else "relative"


def order_keys(
    order: Order, scores: Scores, entries: Mapping[str, Tensor]
) -> list[Mapping[str, Tensor]]:
    """Return the scores of an order, the deciding one first.

    Those of "relative" are ||W||; whoever ranks them divides by the mean of each layer, see
    :func:`dessilbi.choosing.selection.rank`.

    Raises:
        ValueError: The order is unknown.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is not known: use one of {', '.join(ORDERS)}")
    keys: list[Mapping[str, Tensor]] = [scores[KIND_OF[order]]]
    if order == "entry":
        never = torch.iinfo(torch.int64).max
        keys.insert(0, {n: -e.masked_fill(e == NEVER, never) for n, e in entries.items()})
    return keys
