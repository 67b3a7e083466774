# SPDX-License-Identifier: Apache-2.0
"""Loading optimizer state: V keeps float32 or wider, and the caller's tensors stay the caller's.

torch casts every floating state tensor to the parameter's dtype, which would ruin V under
low-precision weights, and may keep references into the given state dict.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dessilbi.blocks.sharding import is_sharded
from dessilbi.optimizers import dual

_LAID_OUT = (dual.STATE_KEY, "momentum_buffer")  # what the step walks through beside the weights


def with_own_options(
    optimizer: Optimizer, given: dict[str, Any], options: Iterable[str]
) -> dict[str, Any]:
    """Complete saved groups that lack ``options`` (torch SGD's have no structure) with ours."""
    groups = given["param_groups"]
    if len(groups) == len(optimizer.param_groups):
        kept = [{k: g[k] for k in options if k in g} for g in optimizer.param_groups]
        groups = [old | new for old, new in zip(kept, groups, strict=True)]
    return {**given, "param_groups": groups}


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
