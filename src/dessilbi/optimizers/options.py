# SPDX-License-Identifier: Apache-2.0
"""Options of a param group: which values are allowed, said in one sentence when they are not."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from dessilbi.blocks.sharding import check_placements, is_sharded
from dessilbi.blocks.structure import resolve

BLOCK_SCALES = ("unit", "sqrt")


def check_group(group: dict[str, Any]) -> None:
    """Check the options of one param group of DessiLBI.

    Raises:
        ValueError: An option is out of range; the message names it, its value and what is allowed.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr has shape {tuple(lr.shape)}: a tensor lr must have one element")
    if not isinstance(lr, Tensor) or lr.device.type == "cpu":
        # A tensor elsewhere is the caller's: reading it would wait for the device.
        _check("lr", lr, 0 <= _number("lr", lr) < math.inf, ">= 0 and finite")
    for name in ("momentum", "weight_decay"):
        _check_and_store(group, name, lambda value: 0 <= value < math.inf, ">= 0 and finite")
    _check_and_store(group, "dampening", math.isfinite, "finite")
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(
            f"nesterov=True with momentum={group['momentum']!r} and "
            f"dampening={group['dampening']!r} is not allowed: it needs momentum > 0, dampening 0"
        )
    check_coupling(group)
    check_structure(group)
    _check_fused(group)


def _check_fused(group: dict[str, Any]) -> None:
    if not group["fused"]:
        return
    if group["foreach"]:
        raise ValueError(
            "fused=True and foreach=True are not allowed together: leave one of them out"
        )
    for param in group["params"]:
        known = param.device.type in ("cpu", "cuda")
        if not param.is_floating_point() or not known or is_sharded(param):
            kind = "sharded" if is_sharded(param) else f"{param.dtype} on {param.device}"
            raise ValueError(
                f"fused=True is not allowed for a parameter of shape {tuple(param.shape)} that is "
                f"{kind}: it needs real floating point weights on CPU or CUDA; leave fused out"
            )


def check_gradient(param: Tensor) -> None:
    """Refuse a sparse gradient.

    Raises:
        ValueError: The parameter's gradient is sparse.
    """
    if param.grad is not None and param.grad.is_sparse:
        raise ValueError(
            f"the gradient of a parameter of shape {tuple(param.shape)} is sparse: DessiLBI "
            f"needs dense gradients; give that parameter (an Embedding with sparse=True?) to "
            f"torch.optim.SparseAdam"
        )


def check_coupling(group: dict[str, Any]) -> None:
    """Check the options that DessiLBI and wrapped optimizers share.

    Raises:
        ValueError: As :func:`check_group`.
    """
    for name in ("kappa", "nu"):
        _check_and_store(group, name, lambda value: 0 < value < math.inf, "> 0 and finite")
    _check_and_store(group, "lam", lambda value: value > 0, "> 0 (inf is allowed)")
    scale, unit = group["block_scale"], group["unit"]
    _check("block_scale", scale, scale in BLOCK_SCALES, " or ".join(map(repr, BLOCK_SCALES)))
    named = isinstance(unit, str) and unit != ""
    _check("unit", unit, unit is None or named, "a name or None")


def _check(name: str, value: object, fine: bool, allowed: str) -> None:
    if not fine:
        raise ValueError(f"{name}={value!r} is not allowed: it must be {allowed}")


def _check_and_store(
    group: dict[str, Any], name: str, fine: Callable[[float], bool], allowed: str
) -> None:
    value = _number(name, group[name])
    _check(name, group[name], fine(value), allowed)
    group[name] = value  # a plain value that survives torch.load


def check_structure(group: dict[str, Any]) -> None:
    """Check that the group's structure fits all of its tensors.

    Raises:
        ValueError: It does not; the message names the tensor, its shape and what to do.
    """
    structure = group["structure"]
    if structure is None:
        if group["unit"] is not None:
            raise ValueError(
                f"unit={group['unit']!r} is not allowed on a group without a structure: "
                f'say which blocks live together, for example structure="filter"'
            )
        return
    for i, param in enumerate(group["params"]):
        name = group["param_names"][i] if "param_names" in group else f"parameter {i}"
        if not param.is_floating_point():
            raise ValueError(
                f"{name} is {param.dtype} and cannot have structure={structure!r}: structures "
                f"need real floating point weights; use structure=None"
            )
        check_placements(param, name)
        resolve(structure, param.shape, name=name)
    if not isinstance(structure, str):
        # A plain value that survives torch.load.
        group["structure"] = tuple(tuple(n) if isinstance(n, list) else n for n in structure)


def _number(name: str, value: object) -> float:
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}={value!r} is not allowed: it must be a number") from None
