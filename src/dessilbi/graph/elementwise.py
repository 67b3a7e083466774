# SPDX-License-Identifier: Apache-2.0
"""Rules for operations element by element: activations, sums, products, and what stays put."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dessilbi.graph.labels import Dead, Ids, blank, small
from dessilbi.graph.reader import Known, Reader, Weight, rule

# f(0) = 0 for these, so a dead channel stays exactly 0.
ZERO_STAYS = [
    "relu",
    "relu6",
    "hardtanh",
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "silu",
    "hardswish",
    "gelu",
    "mish",
    "tanh",
    "softsign",
    "hardshrink",
    "softshrink",
    "abs",
    "neg",
    "sin",
    "tan",
    "asin",
    "atan",
    "sinh",
    "asinh",
    "sqrt",
    "square",
    "sign",
    "erf",
    "expm1",
    "log1p",
    "round",
    "floor",
    "ceil",
    "trunc",
    "clone",
    "contiguous",
    "alias",
    "detach",
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "to",
    "_to_copy",
    "float",
    "half",
    "double",
    "bfloat16",
    "type_as",
    "lift_fresh_copy",
    "relu_",
    "tanhshrink",
    "rrelu",
]
ZERO_MOVES = [
    "sigmoid",
    "hardsigmoid",
    "softplus",
    "exp",
    "cos",
    "log_sigmoid",
    "logsigmoid",
    "cosh",
    "acos",
    "rsqrt",
    "reciprocal",
    "log",
]


@rule(*ZERO_STAYS)
def zero_stays(reader: Reader, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Labels pass unchanged (clipping and rounding included)."""
    return reader.labels_of(x)


@rule("hardtanh", "clamp", "clamp_min", "clamp_max", "threshold")
def clamp(reader: Reader, x: Any, *bounds: Any, **kwargs: Any) -> Any:
    """A range that may exclude 0: the value when dead becomes a constant."""
    if any(isinstance(b, Tensor | Weight) for b in (*bounds, *kwargs.values())):
        return reader.unknown(x, *bounds, *kwargs.values())
    labels = reader.labels_of(x)
    numbers = [b for b in (*bounds, *kwargs.values()) if isinstance(b, int | float)]
    if reader.where.startswith("hardtanh") and len(numbers) in (0, 2):
        low, high = numbers or (-1.0, 1.0)
        if low <= 0 <= high:
            return labels
    return zero_moves(reader, x)


@rule(*ZERO_MOVES)
def zero_moves(reader: Reader, x: Any, *args: Any, **kwargs: Any) -> Any:
    """What was 0 when dead becomes a constant."""
    return reader.derive(reader.labels_of(x), lambda dead: np.maximum(dead, Dead.CONSTANT))


def combine(
    reader: Reader, a: Any, b: Any, outcome: Callable[[Ids, Ids], Ids], *, gate: bool = False
) -> Tensor:
    """Merge what meets in an operation of two tensors.

    ``outcome`` maps both values when dead to the result's; 3 stands for "unlabelled number" and 4
    for any other unlabelled tensor. With ``gate`` a result that is 0 needs only the factor that is.
    """
    one, two = reader.labels_of(a), reader.labels_of(b)
    shape: torch.Size = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
        one.shape, two.shape
    )
    _check_alone(reader, one, two, shape)
    _check_alone(reader, two, one, shape)
    first, second = small([one.expand(shape), two.expand(shape)])
    first, second = torch.broadcast_tensors(first, second)  # type: ignore[no-untyped-call]
    ids, inverse = np.unique(
        np.stack([first.numpy().ravel(), second.numpy().ravel()]), axis=1, return_inverse=True
    )
    left, right = ids
    both = (left != 0) & (right != 0)
    reader.labels.merge(left[both], right[both], "")
    states = [
        np.where(side == 0, 3 if _is_number(value) else 4, reader.labels.dead[side])
        for side, value in ((left, a), (right, b))
    ]
    dead = outcome(*states)
    needs = np.stack([left, right], axis=1)
    if gate:
        only_left = both & (states[0] == Dead.ZERO) & (states[1] != Dead.ZERO)
        only_right = both & (states[1] == Dead.ZERO) & (states[0] != Dead.ZERO)
        needs[only_left, 1] = 0
        needs[only_right, 0] = 0
    new = reader.labels.fresh(ids.shape[1], np.minimum(dead, Dead.VARIES), needs)
    alive = np.maximum(left, right)
    new = np.where(alive == 0, 0, new)
    reader.labels.merge(new, alive, "")
    return torch.from_numpy(new[inverse.ravel()].reshape(tuple(first.shape))).expand(shape)


def _is_number(value: Any) -> bool:
    if isinstance(value, Known):
        return value.value.numel() == 1
    return not isinstance(value, Tensor | Weight)


def _check_alone(reader: Reader, plain: Tensor, labelled: Tensor, shape: torch.Size) -> None:
    """An unlabelled tensor cannot shrink: labels beside it must not vary along its dimensions."""
    own = (1,) * (len(shape) - plain.dim()) + tuple(plain.shape)
    dims = [d for d, size in enumerate(own) if size > 1]
    wide, other = small([labelled.expand(shape), plain.expand(shape)])
    alone = torch.where(other == 0, wide, 0)
    if dims and bool((alone != 0).any()):
        reason = f"{reader.where} joins it with a tensor that keeps its size"
        if bool((other != 0).any()):  # partly labelled: only what stands alone is held
            reader.labels.freeze(alone.numpy(), reason)
        else:
            reader.must_not_vary(wide, dims, reason)


def _sum(a: Ids, b: Ids) -> Ids:
    zero = (a == Dead.ZERO) & (b == Dead.ZERO)
    constant = ((a <= 1) | (a == 3)) & ((b <= 1) | (b == 3))
    return np.where(zero, Dead.ZERO, np.where(constant, Dead.CONSTANT, Dead.VARIES))


def _product(a: Ids, b: Ids) -> Ids:
    return np.where((a == Dead.ZERO) | (b == Dead.ZERO), Dead.ZERO, _sum(a, b))


def _quotient(a: Ids, b: Ids) -> Ids:
    return np.where((a == Dead.ZERO) & (b != Dead.ZERO), Dead.ZERO, _sum(a, b))


@rule("add", "sub", "rsub", "maximum", "minimum", "max.other", "pow", "atan2")
def add(reader: Reader, a: Any, b: Any, *_: Any, **__: Any) -> Tensor:
    """0 when dead only if both parts are; a number beside it makes a constant."""
    return combine(reader, a, b, _sum)


@rule("mul")
def mul(reader: Reader, a: Any, b: Any) -> Tensor:
    """One factor that is 0 suffices; the other one is a gate and need not be dead."""
    return combine(reader, a, b, _product, gate=True)


@rule("div", "true_divide")
def div(reader: Reader, a: Any, b: Any, **_: Any) -> Tensor:
    """0 divided by anything that is not 0 stays 0."""
    return combine(reader, a, b, _quotient, gate=True)


@rule("masked_fill")
def masked_fill(reader: Reader, x: Any, mask: Any, value: Any) -> Any:
    """A mask of constant shape writes a number: labels must not vary along the mask."""
    if isinstance(value, Tensor | Weight):
        return reader.unknown(x, mask, value)
    return combine(reader, x, mask, lambda a, b: np.full_like(a, Dead.VARIES))


@rule("softmax", "_softmax", "log_softmax", "_log_softmax")
def softmax(reader: Reader, x: Any, dim: int, *_: Any, **__: Any) -> Tensor:
    """Normalises along ``dim``: labels must not vary there."""
    labels = reader.labels_of(x)
    reader.must_not_vary(labels, [dim], f"{reader.where} normalises over it")
    return reader.derive(labels, lambda dead: np.full_like(dead, Dead.VARIES))


@rule("ne", "eq", "gt", "lt", "ge", "le", "logical_not", "bitwise_not", "isnan", "argmax")
def compare(reader: Reader, *values: Any, **_: Any) -> Any:
    """Comparisons are never followed."""
    return reader.unknown(*values)


@rule("sym_size", "_assert_tensor_metadata", "_assert_scalar")
def nothing(reader: Reader, *_: Any, **__: Any) -> Any:
    """Carries no values."""
    return blank(())
