# SPDX-License-Identifier: Apache-2.0
"""Rules for operations that merge elements of one tensor: means, norms, pooling, resizing."""

from typing import Any

import numpy as np
from torch import Tensor

from dessilbi.graph.labels import Dead
from dessilbi.graph.movement import spread
from dessilbi.graph.reader import Reader, rule


@rule("mean", "sum", "amax", "amin", "linalg_vector_norm", "norm", "std", "var")
def reduce(reader: Reader, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Reduce dimensions along which labels do not vary; 0 stays 0, a constant stays constant."""
    assert reader.node is not None
    labels = reader.labels_of(x)
    schema = [a.name for a in reader.node.target._schema.arguments][1:]  # type: ignore[union-attr]
    given = {**dict(zip(schema, args, strict=False)), **kwargs}
    if given.get("ord", 2) in (0, float("-inf")):
        return reader.unknown(x)
    dims = given.get("dim")
    if isinstance(dims, int):
        dims = [dims]
    if not dims:
        dims = list(range(labels.dim()))
    result = reader.collapse(labels, dims, f"{reader.where} runs over it")
    if given.get("keepdim", False):
        return result
    for dim in sorted((d % labels.dim() for d in dims), reverse=True):
        result = result.squeeze(dim)
    return result


POOLS = ["max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool"]


@rule(*(f"{name}{n}d" for name in POOLS for n in (1, 2, 3)))
def pool(reader: Reader, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Channel by channel; averages that count zero padding make a constant vary."""
    labels = spread(reader, x, _rank(reader))
    padded = len(args) > 2 and np.any(np.asarray(args[2]))
    if reader.where.startswith("avg_pool") and (padded or "padding" in kwargs):
        return reader.derive(labels, lambda dead: np.where(dead == Dead.ZERO, 0, Dead.VARIES))
    return labels


@rule(
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_linear1d",
    "upsample_trilinear3d",
)
def resize(reader: Reader, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Channel by channel."""
    return spread(reader, x, _rank(reader))


def _rank(reader: Reader) -> int:
    """Number of spatial dimensions, the digit before the d at the end of the name."""
    assert reader.node is not None
    name = reader.where.split(" ")[0]
    return int(name[-2])
