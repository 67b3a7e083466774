# SPDX-License-Identifier: Apache-2.0
"""Rules for operations element by element: activations, sums, products, and what stays put."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dessilbi.graph.labels import Dead, Ids, blank, small, tidy
from dessilbi.graph.program import op_name
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
    "nan_to_num",
    "sgn",
    "fix",
    "deg2rad",
    "atanh",
    "erfinv",
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
    "sinc",
    "erfc",
    "exp2",
    "logical_not",
    "bitwise_not",
    "isnan",
    "isinf",
    "isfinite",
]


@rule(*ZERO_STAYS)
def zero_stays(reader: Reader, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Labels pass unchanged (clipping and rounding included)."""
    return reader.labels_of(x)


@rule("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "rrelu")
def dropout(reader: Reader, x: Any, *args: Any, **__: Any) -> Any:
    """Nothing in eval mode; random where forward insists on training."""
    if any(flag is True for flag in args):
        return reader.unknown(x, reason=f"{reader.where} is random in eval mode as well")
    return reader.labels_of(x)


@rule("hardtanh", "clamp", "clamp_min", "clamp_max")
def clamp(reader: Reader, x: Any, low: Any = None, high: Any = None, **kwargs: Any) -> Any:
    """A range that may exclude 0: the value when dead becomes a constant."""
    assert reader.node is not None
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    name = op_name(reader.node)
    if name == "clamp_max":
        low, high = None, high if low is None else low
    if name == "hardtanh":
        low, high = kwargs.get("min_val", low), kwargs.get("max_val", high)
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    if any(isinstance(b, Tensor | Weight | Known) for b in (low, high)):
        return reader.unknown(x, low, high)
    if (low is None or low <= 0) and (high is None or high >= 0):
        return reader.labels_of(x)
    return zero_moves(reader, x)


@rule("threshold")
def threshold(reader: Reader, x: Any, border: float, value: float) -> Any:
    """What lies above the border stays."""
    return reader.labels_of(x) if border < 0 or value == 0 else zero_moves(reader, x)


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
    one, two = _single(reader, one, two, shape), _single(reader, two, one, shape)
    _check_alone(reader, one, two, shape)
    _check_alone(reader, two, one, shape)
    first, second = small([one.expand(shape), two.expand(shape)])
    first, second = torch.broadcast_tensors(first, second)  # type: ignore[no-untyped-call]
    ids, inverse = np.unique(
        np.stack([first.numpy().ravel(), second.numpy().ravel()]), axis=1, return_inverse=True
    )
    left, right = ids
    both = (left != 0) & (right != 0)
    if outcome is _sum:
        apart = reader.labels.roots(left[both]) != reader.labels.roots(right[both])
        reader.summed.append(left[both][apart])
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
    reader.labels.attach(new, alive)
    return torch.from_numpy(new[inverse.ravel()].reshape(tuple(first.shape))).expand(shape)


def _is_number(value: Any) -> bool:
    if isinstance(value, Known):
        return value.value.numel() == 1
    if isinstance(value, Weight):
        return all(size == 1 for size in value.shape)
    return not isinstance(value, Tensor)


def _single(reader: Reader, own: Tensor, other: Tensor, shape: torch.Size) -> Tensor:
    """One channel that is spread over many others stays: it need not die with them."""
    core = small([own])[0]
    if core.numel() != 1 or not int(core.max()):
        return own
    sizes = (1,) * (len(shape) - own.dim()) + tuple(own.shape)
    dims = [d for d, n in enumerate(sizes) if n == 1 and shape[d] > 1]
    if not reader.varies(other.expand(shape), dims):
        return own
    reader.labels.freeze(core.numpy(), f"{reader.where} spreads it over others")
    return blank(own.shape)


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


@rule("add", "sub", "rsub", "maximum", "minimum", "atan2", "hypot", "lerp")
def add(reader: Reader, a: Any, b: Any, weight: Any = None, *_: Any, **__: Any) -> Tensor:
    """0 when dead only if both parts are; a number beside it makes a constant."""
    both = combine(reader, a, b, _sum)
    if isinstance(weight, Tensor | Weight | Known):  # lerp by a tensor
        return combine(reader, both, weight, _both)
    return both


@rule("pow")
def power(reader: Reader, a: Any, b: Any) -> Tensor:
    """0 to a positive number stays 0."""
    if isinstance(b, int | float) and b > 0:
        return reader.labels_of(a)
    return combine(reader, a, b, _both)


@rule("addcmul", "addcdiv")
def addcmul(reader: Reader, x: Any, a: Any, b: Any, **_: Any) -> Tensor:
    """Adds a product or a quotient."""
    assert reader.node is not None
    outcome = _product if op_name(reader.node) == "addcmul" else _quotient
    return combine(reader, x, combine(reader, a, b, outcome, gate=True), _sum)


@rule("where")
def where(reader: Reader, condition: Any, a: Any, b: Any) -> Any:
    """0 when dead if both choices are, whatever the condition."""
    if _is_number(a) and _is_number(b):
        return combine(reader, condition, a, _both)
    zero = (_is_zero(a), _is_zero(b))

    def either(one: Ids, two: Ids) -> Ids:  # 3: a number
        return _sum(np.where((one == 3) & zero[0], 0, one), np.where((two == 3) & zero[1], 0, two))

    def chosen(condition: Ids, value: Ids) -> Ids:
        return np.where(value == Dead.ZERO, Dead.ZERO, _both(condition, value))

    return combine(reader, condition, combine(reader, a, b, either), chosen)


def _is_zero(value: Any) -> bool:
    if isinstance(value, Known):
        return value.value.numel() == 1 and not bool(value.value.any())
    return isinstance(value, int | float) and value == 0


def _both(a: Ids, b: Ids) -> Ids:
    """A constant if both are, never surely 0."""
    return np.maximum(_sum(a, b), Dead.CONSTANT)


@rule("mul")
def mul(reader: Reader, a: Any, b: Any) -> Tensor:
    """One factor that is 0 suffices; the other one is a gate and need not be dead."""
    return combine(reader, a, b, _product, gate=True)


@rule("div", "true_divide", "floor_divide", "remainder", "fmod")
def div(reader: Reader, a: Any, b: Any, **_: Any) -> Tensor:
    """0 divided by anything that is not 0 stays 0."""
    return combine(reader, a, b, _quotient, gate=True)


@rule("masked_fill")
def masked_fill(reader: Reader, x: Any, mask: Any, value: Any) -> Any:
    """A mask writes a number: 0 stays 0 only where that is 0."""
    if isinstance(value, Tensor | Weight):
        return reader.unknown(x, mask, value)
    zero = _is_zero(value)
    return combine(reader, x, mask, lambda a, _: np.where(zero & (a == 0), 0, Dead.VARIES))


@rule("glu")
def glu(reader: Reader, x: Any, dim: int = -1) -> Tensor:
    """The first half times a gate of the second."""
    one, two = reader.labels_of(x).chunk(2, dim)
    return combine(reader, tidy(one), tidy(two), _product, gate=True)


@rule("softmax", "_softmax", "log_softmax", "_log_softmax")
def softmax(reader: Reader, x: Any, dim: int, *_: Any, **__: Any) -> Tensor:
    """Normalises along ``dim``: labels must not vary there."""
    labels = reader.labels_of(x)
    reader.must_not_vary(labels, [dim], f"{reader.where} normalises over it")
    reader.attended.append(np.unique(small([labels])[0].numpy()))
    return reader.derive(labels, lambda dead: np.full_like(dead, Dead.VARIES))


@rule("ne", "eq", "gt", "lt", "ge", "le", "logaddexp")
@rule(*(f"{kind}_{name}" for kind in ("logical", "bitwise") for name in ("and", "or", "xor")))
@rule("__and__", "__or__", "__xor__")
def compare(reader: Reader, a: Any, b: Any) -> Tensor:
    """Yes or no (and other numbers) element by element: a constant where both sides are."""
    return combine(reader, a, b, _both)


@rule("zeros_like", "ones_like", "full_like", "empty_like", "fill")
def like(reader: Reader, x: Any, *_: Any, **__: Any) -> Tensor:
    """Shaped like an activation and follows its size."""
    assert reader.node is not None
    special = {"zeros_like": Dead.ZERO, "empty_like": Dead.VARIES}
    dead = special.get(op_name(reader.node), Dead.CONSTANT)
    return reader.derive(reader.labels_of(x), lambda ids: np.full_like(ids, dead))
