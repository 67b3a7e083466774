# SPDX-License-Identifier: Apache-2.0
"""Rules for operations that merge elements of one tensor: means, norms, pooling, resizing."""

from typing import Any

import numpy as np
from torch import Tensor

from dessilbi.graph.elementwise import add
from dessilbi.graph.labels import Dead, along
from dessilbi.graph.movement import spread
from dessilbi.graph.program import op_name
from dessilbi.graph.reader import Known, Reader, Weight, rule

_ADD_UP = frozenset({"sum", "mean", "linalg_vector_norm", "norm"})


@rule("mean", "sum", "amax", "amin", "linalg_vector_norm", "norm", "std", "var", "any", "prod")
def reduce(reader: Reader, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Reduce dimensions; 0 stays 0, a constant stays constant.

    Zeros add nothing to sums and norms, so what is 0 when dead may leave them (a mean then keeps
    its old count); otherwise labels must not vary along the dimensions.
    """
    assert reader.node is not None
    labels = reader.labels_of(x)
    schema = [a.name for a in reader.node.target._schema.arguments][1:]  # type: ignore[union-attr]
    given = {**dict(zip(schema, args, strict=False)), **kwargs}
    order = given.get("ord", given.get("p", 2))
    if not isinstance(order, int | float | None) or (order is not None and order <= 0):
        return reader.unknown(x)
    dims = given.get("dim")
    if isinstance(dims, int):
        dims = [dims]
    if not dims:
        dims = list(range(labels.dim()))
    if op_name(reader.node) in _ADD_UP:
        result = reader.add_up(labels, dims)
    else:
        result = reader.collapse(labels, dims, f"{reader.where} runs over it")
    if given.get("keepdim", False):
        return result
    for dim in sorted((d % labels.dim() for d in dims), reverse=True):
        result = result.squeeze(dim)
    return result


@rule("max", "min")
def extreme(reader: Reader, x: Any, other: Any = None, keepdim: bool = False) -> Any:
    """Of two tensors, of all elements, or along a dimension (values and positions)."""
    if isinstance(other, Tensor | Weight | Known):
        return add(reader, x, other)
    labels = reader.labels_of(x)
    dims = list(range(labels.dim())) if other is None else [other]
    result = reader.collapse(labels, dims, f"{reader.where} runs over it")
    if other is None:
        return result.reshape(())
    result = result if keepdim else result.squeeze(other)
    return result, reader.derive(result, lambda dead: np.full_like(dead, Dead.VARIES))


@rule("cumsum")
def cumsum(reader: Reader, x: Any, dim: int, **_: Any) -> Any:
    """Labels must not vary along the dimension; a constant adds up to something else."""
    labels = reader.labels_of(x)
    reader.must_not_vary(labels, [dim], f"{reader.where} runs over it")
    return reader.derive(labels, lambda dead: np.where(dead == Dead.ZERO, 0, Dead.VARIES))


POOLS = ["max_pool", "avg_pool", "adaptive_avg_pool"]


@rule(*(f"{name}{n}d" for name in POOLS for n in (1, 2, 3)), "_adaptive_avg_pool2d")
def pool(reader: Reader, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Channel by channel; averages that count zero padding make a constant vary."""
    assert reader.node is not None
    labels = spread(reader, x, _rank(reader))
    # padding, ceil_mode, (count_include_pad,) divisor_override: borders see fewer taps
    border = any(np.any(np.asarray(a)) for a in args[2:4]) and args[4:5] != (False,)
    border = border or any(a is not None for a in args[5:])
    if op_name(reader.node).startswith("avg_pool") and (border or kwargs):
        return reader.derive(labels, lambda dead: np.where(dead == Dead.ZERO, 0, Dead.VARIES))
    return labels


@rule("max_pool2d_with_indices", "max_pool3d_with_indices")
@rule(*(f"adaptive_max_pool{n}d" for n in (1, 2, 3)))
def pool_with_indices(reader: Reader, x: Any, *_: Any, **__: Any) -> Any:
    """Values and positions."""
    labels = spread(reader, x, _rank(reader))
    return labels, reader.derive(labels, lambda dead: np.full_like(dead, Dead.VARIES))


@rule("im2col")
def unfold(reader: Reader, x: Any, kernel: Any, dilation: Any, padding: Any, _: Any) -> Tensor:
    """Every channel becomes one channel per tap."""
    labels = reader.labels_of(x)
    if np.any(np.asarray(padding)):
        labels = reader.derive(labels, lambda dead: np.where(dead == Dead.ZERO, 0, Dead.VARIES))
    dim = labels.dim() - 3
    ids = reader.channels(labels, dim).repeat(int(np.prod(kernel)))
    return along(ids, dim, reader.out_shape)


@rule(
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_linear1d",
    "upsample_trilinear3d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)
def resize(reader: Reader, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Channel by channel."""
    return spread(reader, x, _rank(reader))


def _rank(reader: Reader) -> int:
    """Number of spatial dimensions, the digit in the name."""
    assert reader.node is not None
    return next(int(letter) for letter in op_name(reader.node) if letter.isdigit())
