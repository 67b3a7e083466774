# SPDX-License-Identifier: Apache-2.0
"""Loading optimizer state: V keeps float32 or wider, and the caller's tensors stay the caller's.

torch casts every floating state tensor to the parameter's dtype, which would ruin V under
low-precision weights, and may keep references into the given state dict.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dessilbi.blocks.naming import canonical_names
from dessilbi.blocks.sharding import is_sharded
from dessilbi.optimizers import dual

_LAID_OUT = (dual.STATE_KEY, "momentum_buffer")  # what the step walks through beside the weights


def with_own_options(
    optimizer: Optimizer, given: dict[str, Any], options: Iterable[str]
) -> dict[str, Any]:
    """Complete saved groups that lack ``options`` (torch SGD's have no structure) with ours.

    Parameters are known by name where both sides name them: torch goes by their places, and would
    take over the names of the file, so that V and tickets would come to belong to other weights.

    Raises:
        ValueError: A parameter of the state has its place in another group, or they are not the
            same parameters.
    """
    groups = given["param_groups"]
    if len(groups) == len(optimizer.param_groups):
        kept = [{k: g[k] for k in options if k in g} for g in optimizer.param_groups]
        groups = [old | new for old, new in zip(kept, groups, strict=True)]
        groups = _by_name(optimizer.param_groups, groups)
    return {**given, "param_groups": groups}


def _by_name(
    own: Sequence[Mapping[str, Any]], saved: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Bring what saved groups list per parameter into the order of our own, under our names."""
    ours, theirs = _names(own), _names(saved)
    if ours is None or theirs is None:
        return list(saved)
    renamed = not {n for names in ours for n in names} & {n for names in theirs for n in names}
    result = []
    for number, (mine, names, group) in enumerate(zip(own, theirs, saved, strict=True)):
        group = {**group, "param_names": list(mine["param_names"])}
        if not renamed and names != ours[number]:
            if sorted(names) != sorted(ours[number]):
                missing = next((n for n in names if n not in ours[number]), None)
                told = f"has {missing} in" if missing else "has fewer parameters in"
                raise ValueError(
                    f"this state {told} param group {number}, and the optimizer has not: build "
                    f"its groups of the same parameters as when the state was saved"
                )
            places = [names.index(name) for name in ours[number]]
            # Distributed checkpoints hand over names in place of numbers, in our order already.
            ordered = all(isinstance(param, str) for param in group["params"])
            for key in (dual.OWN_LAM,) if ordered else ("params", dual.OWN_LAM):
                if key in group:
                    group[key] = [group[key][place] for place in places]
        result.append(group)
    return result


def _names(groups: Sequence[Mapping[str, Any]]) -> list[list[str]] | None:
    """Canonical names by group; None where some have no names of their own."""
    if any("param_names" not in group for group in groups):
        return None
    names = iter(canonical_names([name for group in groups for name in group["param_names"]]))
    return [[next(names) for _ in group["param_names"]] for group in groups]


def own_loaded_state(optimizer: Optimizer, given: dict[str, Any]) -> None:
    """Replace what torch made of ``given``: V in its own dtype, and no tensor shared with it."""
    ids = [i for group in given["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, param in zip(ids, params, strict=True):
        told = given["state"].get(i, {})
        own = optimizer.state.get(param, {})
        for key, value in own.items():
            if key == dual.STATE_KEY:
                value = told[key].to(device=param.device, dtype=dual.dual_dtype(param))
            if isinstance(value, Tensor):
                own[key] = value.clone() if value is told.get(key) else value
            if key in _LAID_OUT:
                own[key] = laid_out(own[key], param)


def laid_out(value: Tensor, param: Tensor) -> Tensor:
    """Return ``value`` in the memory order of ``param``: files keep none, and sums depend on it."""
    if type(value) is not Tensor or is_sharded(param) or value.shape != param.shape:
        return value
    if value.stride() == param.stride():
        return value
    return torch.empty_like(param, dtype=value.dtype).copy_(value)
