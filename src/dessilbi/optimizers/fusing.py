# SPDX-License-Identifier: Apache-2.0
"""Fusing: which tensors of an optimizer a fused kernel takes, and which kernel that is.

``fused=True`` may build the CPU kernel, once, into the user's cache; ``fused=None`` uses what is
built. What a kernel cannot take (sharded tensors, tensors with gaps in memory, foreign devices)
steps as it would without one.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dessilbi.blocks.structure import is_elementwise
from dessilbi.kernels import building
from dessilbi.kernels.cpu import CpuKernel
from dessilbi.kernels.layout import Levels, levels_of, memory_order
from dessilbi.kernels.pieces import Kernel
from dessilbi.optimizers import dual

Group = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Choice:
    """What fused kernels take of an optimizer, as its groups and tensors are now.

    ``found`` are all structured tensors, in their units; ``levels`` has every parameter that is
    taken: its levels, or None where no norms are needed; ``kernels`` says by which kernel.
    """

    units: list[list[dual.Member]]
    levels: dict[Tensor, Levels | None]
    kernels: dict[Tensor, Kernel]


def choose(
    optimizer: Optimizer, asks: Callable[[Group], bool | None], state_keys: tuple[str, ...]
) -> Choice:
    """Return which tensors are fused; a unit is taken whole or not at all.

    Args:
        optimizer: The optimizer.
        asks: Whether a group asks for it; None: if nothing has to be compiled for it.
        state_keys: The state tensors that the kernel moves.

    Raises:
        ValueError: Members of a unit do not agree.
    """
    choice = Choice(dual.units_of(dual.members(optimizer)), {}, {})
    known: dict[tuple[str, bool], Kernel | None] = {}
    for group in optimizer.param_groups:
        asked = asks(group)
        if asked is False:
            continue
        for p in group["params"]:
            sort = (p.device.type, bool(asked))
            if sort not in known:
                known[sort] = kernel_for(p.device.type, asked=bool(asked))
            kernel = known[sort]
            if kernel is None or not kernel.takes(p) or not _lr_is_at_hand(group.get("lr"), p):
                continue
            if _fits(optimizer, p, state_keys):
                choice.kernels[p], choice.levels[p] = kernel, None
    for unit in choice.units:
        if _is_taken(unit, choice):
            continue
        for member in unit:
            choice.levels.pop(member.param, None)
            choice.kernels.pop(member.param, None)
    return choice


def _is_taken(unit: list[dual.Member], choice: Choice) -> bool:
    """Whether all members of a unit can be fused together; their levels are noted down."""
    params = [member.param for member in unit]
    if len({p.device for p in params}) > 1 or not all(p in choice.levels for p in params):
        return False
    if unit[0].group.get("unit") is None and is_elementwise(unit[0].block):
        return True
    for member in unit:
        p = member.param
        choice.levels[p] = levels_of(p.shape, p.stride(), member.block)
        if not choice.kernels[p].walks(choice.levels[p]):
            return False
    return True


def kernel_for(device_type: str, *, asked: bool) -> Kernel | None:
    """Return the fused kernel of a kind of device if it is there; nothing is built.

    Args:
        device_type: "cpu", "cuda", ...
        asked: Whether the user asked for it. Triton compiles at the first step: not unasked.
    """
    if device_type == "cuda":
        return _triton() if asked else None
    if device_type != "cpu":
        return None
    file = building.find()
    return None if file is None else _loaded(file)


@lru_cache
def _triton() -> Kernel | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from dessilbi.kernels.cuda import TritonKernel  # loads Triton

    return TritonKernel()


@lru_cache
def _loaded(file: Path) -> Kernel | None:
    try:
        return CpuKernel(file)
    except OSError:
        return None


def prepare(params: Iterable[Tensor]) -> None:
    """Build the CPU kernel if it is not there; say once per process what is not to be had."""
    devices = {p.device.type for p in params}
    if "cpu" in devices:
        _prepare(os.environ.get("DESSILBI_CACHE"))
    if "cuda" in devices and _triton() is None:
        _miss_triton()


@lru_cache
def _miss_triton() -> None:
    warnings.warn(
        "fused=True falls back to the slower foreach step on CUDA, because Triton is not "
        "installed: pip install triton",
        stacklevel=2,
    )


@lru_cache
def _prepare(cache: str | None) -> None:
    try:
        CpuKernel(building.build())
    except (building.NoKernelError, OSError) as error:
        warnings.warn(
            f"fused=True falls back to the slower reference step on this machine: {error}",
            stacklevel=2,
        )


def _lr_is_at_hand(lr: object, p: Tensor) -> bool:
    """Whether the kernel can have lr without waiting for another device."""
    return not isinstance(lr, Tensor) or lr.device.type == "cpu" or lr.device == p.device


def _fits(optimizer: Optimizer, p: Tensor, state_keys: tuple[str, ...]) -> bool:
    if type(p) not in (Tensor, torch.nn.Parameter) or p.layout is not torch.strided:
        return False
    if p.grad is not None and p.grad.dtype != p.dtype:
        return False
    if (
        p.numel() == 0
        or p.is_inference()
        or p.is_neg()
        or memory_order(p.shape, p.stride()) is None
    ):
        return False
    state = optimizer.state.get(p, {})
    for key in state_keys:
        x = dual.v_of(optimizer, p) if key == dual.STATE_KEY else state.get(key)
        dtype = dual.dual_dtype(p) if key == dual.STATE_KEY else p.dtype
        if x is not None and not lies_as(x, p, dtype):
            return False
    return True


def lies_as(x: Tensor, p: Tensor, dtype: torch.dtype) -> bool:
    """Return whether ``x`` is a plain tensor with every element at the place it has in ``p``."""
    if type(x) is not Tensor or x.layout is not torch.strided or x.is_neg() or x.is_inference():
        return False
    if x.dtype != dtype or x.device != p.device or x.shape != p.shape:
        return False
    if x.is_contiguous() and p.is_contiguous():
        return True
    pairs = zip(x.stride(), p.stride(), p.shape, strict=True)
    return all(mine == theirs for mine, theirs, size in pairs if size != 1)
