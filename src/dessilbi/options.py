# SPDX-License-Identifier: Apache-2.0
"""Options of a param group: which values are allowed, said in one sentence when they are not."""

import math
from typing import Any

from torch import Tensor

from dessilbi.structure import resolve

BLOCK_SCALES = ("unit", "sqrt")


def check_group(group: dict[str, Any]) -> None:
    """Check the options of one param group.

    Raises:
        ValueError: An option is out of range; the message names it, its value and what is allowed.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr has shape {tuple(lr.shape)}: a tensor lr must have one element")
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        lr = 0.0  # reading it would wait for the device; it is the caller's
    ranges = [
        ("lr", lr, 0 <= _number("lr", lr) < math.inf, ">= 0 and finite"),
        *(
            (name, group[name], 0 < _number(name, group[name]) < math.inf, "> 0 and finite")
            for name in ("kappa", "nu")
        ),
        ("lam", group["lam"], _number("lam", group["lam"]) > 0, "> 0 (inf is allowed)"),
        *(
            (name, group[name], 0 <= _number(name, group[name]) < math.inf, ">= 0 and finite")
            for name in ("momentum", "weight_decay")
        ),
        (
            "dampening",
            group["dampening"],
            math.isfinite(_number("dampening", group["dampening"])),
            "finite",
        ),
        (
            "block_scale",
            group["block_scale"],
            group["block_scale"] in BLOCK_SCALES,
            " or ".join(map(repr, BLOCK_SCALES)),
        ),
        (
            "unit",
            group["unit"],
            group["unit"] is None or (isinstance(group["unit"], str) and group["unit"] != ""),
            "a name or None",
        ),
    ]
    for name, value, fine, allowed in ranges:
        if not fine:
            raise ValueError(f"{name}={value!r} is not allowed: it must be {allowed}")
    for name in ("kappa", "nu", "lam", "momentum", "weight_decay", "dampening"):
        group[name] = float(group[name])  # a plain value that survives torch.load
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(
            f"nesterov=True with momentum={group['momentum']!r} and "
            f"dampening={group['dampening']!r} is not allowed: it needs momentum > 0, dampening 0"
        )
    _check_structure(group)


def _check_structure(group: dict[str, Any]) -> None:
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
        resolve(structure, param.shape, name=name)
    if not isinstance(structure, str):
        group["structure"] = tuple(structure)  # a plain value that survives torch.load


def _number(name: str, value: object) -> float:
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}={value!r} is not allowed: it must be a number") from None
