# SPDX-License-Identifier: Apache-2.0
"""Inputs: what example inputs look like, as plain data, and others of the same kind drawn from it.

A description holds shapes, types and ranges, never the examples themselves. What is drawn from it
is the same on every machine and with every version of torch: uniform numbers of one generator
whose stream is fixed, scaled in plain float64 arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, prod, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dessilbi.files.storage import told_by
from dessilbi.graph.program import ExampleInputs, as_arguments

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Scalar = None | bool | int | float | str

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
LARGEST = 1 << 27  # elements of one input: half a gigabyte of float32


@dataclass(frozen=True)
class TensorInput:
    """A tensor argument: ``name`` is None where it is positional.

    Floating tensors are drawn uniformly with ``mean`` and deviation ``spread``, whole numbers
    uniformly from ``low`` to ``high``.
    """

    name: str | None
    shape: tuple[int, ...]
    dtype: str
    mean: float = 0.0
    spread: float = 1.0
    low: int = 0
    high: int = 0

    def __post_init__(self) -> None:
        """Check everything before anything is allocated."""
        if self.dtype not in DTYPES:
            raise ValueError(
                f"inputs of type {told_by(self.dtype, 40)} are not known: use {', '.join(DTYPES)}"
            )
        if any(n < 0 for n in self.shape) or prod(self.shape) > LARGEST:
            raise ValueError(
                f"an input of shape {self.shape} is not allowed: at most {LARGEST:,} elements"
            )
        if not (isfinite(self.mean) and isfinite(self.spread)):
            raise ValueError(
                f"the example input{f' {self.name}' if self.name else ''} has values that are not "
                f"finite: give finite ones"
            )
        dtype = DTYPES[self.dtype]
        if not dtype.is_floating_point and dtype != torch.bool:
            limits = torch.iinfo(dtype)
            if not limits.min <= self.low <= self.high <= limits.max:
                raise ValueError(f"whole numbers from {self.low} to {self.high} do not exist")


@dataclass(frozen=True)
class FixedInput:
    """An argument that is not a tensor and stays as it is."""

    name: str | None
    value: Any


Input = TensorInput | FixedInput


def describe(example_inputs: ExampleInputs) -> tuple[Input, ...]:
    """Return what forward's arguments look like.

    Raises:
        ValueError: They are of a wrong type, too large or not finite.

    >>> describe(torch.tensor([[3, 5]]))
    (TensorInput(name=None, shape=(1, 2), dtype='int64', mean=0.0, spread=1.0, low=3, high=5),)
    """
    args, kwargs = as_arguments(example_inputs)
    named = [*((None, value) for value in args), *kwargs.items()]
    return tuple(_describe(name, value) for name, value in named)


def _describe(name: str | None, value: Any) -> Input:
    dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
    if not isinstance(value, Tensor) or dtype not in DTYPES:
        return FixedInput(name, value)
    shape = tuple(value.shape)
    if not value.numel():
        return TensorInput(name, shape, dtype)
    wide = value.detach().double()
    if value.is_floating_point() or value.dtype == torch.bool:
        spread = float(wide.std(correction=0)) or 1.0
        return TensorInput(name, shape, dtype, mean=float(wide.mean()), spread=spread)
    return TensorInput(name, shape, dtype, low=int(value.min()), high=int(value.max()))


def draw(inputs: Sequence[Input], count: int, *, batch: int | None = None) -> list[Arguments]:
    """Return ``count`` times the arguments that ``inputs`` describes, always the same ones.

    Args:
        inputs: As :func:`describe` returns them.
        count: How many.
        batch: Size of the first dimension of every tensor, where another is wanted.

    >>> (x,), _ = draw(describe(torch.zeros(2, 3)), 1)[0]
    >>> x.shape, bool(x.std() > 0)
    (torch.Size([2, 3]), True)
    """
    stream = np.random.RandomState(0)
    drawn = []
    for _ in range(count):
        values = [(item.name, _draw(item, stream, batch)) for item in inputs]
        args = tuple(value for name, value in values if name is None)
        drawn.append((args, {name: value for name, value in values if name is not None}))
    return drawn


def _draw(item: Input, stream: np.random.RandomState, batch: int | None) -> Any:
    if isinstance(item, FixedInput):
        return item.value
    shape = item.shape if batch is None or not item.shape else (batch, *item.shape[1:])
    uniform = stream.random_sample(shape)
    dtype = DTYPES[item.dtype]
    values: np.ndarray[Any, Any]
    if dtype.is_floating_point:
        values = item.mean + item.spread * sqrt(12.0) * (uniform - 0.5)
    elif dtype == torch.bool:
        values = uniform < item.mean
    else:
        values = np.floor(item.low + uniform * (item.high - item.low + 1)).clip(item.low, item.high)
    return torch.from_numpy(np.asarray(values)).to(dtype)
