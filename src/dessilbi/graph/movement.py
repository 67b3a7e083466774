# SPDX-License-Identifier: Apache-2.0
"""Rules for operations that only move elements: they run on the label tensors themselves."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dessilbi.graph.elementwise import combine
from dessilbi.graph.labels import Dead, along, small, tidy
from dessilbi.graph.reader import Known, Reader, Weight, rule

MOVES = [
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "permute",
    "transpose",
    "t",
    "unsqueeze",
    "squeeze",
    "expand",
    "slice",
    "narrow",
    "movedim",
    "swapaxes",
    "swapdims",
    "flip",
    "repeat",
    "tile",
    "split",
    "split_with_sizes",
    "chunk",
    "tensor_split",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "unsafe_chunk",
    "unsafe_split",
    "repeat_interleave",
    "view_as",
    "reshape_as",
]


@rule(*MOVES)
def move(reader: Reader, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the very operation on the labels."""
    assert reader.node is not None
    labels = reader.labels_of(x)
    args = tuple(reader.labels_of(a) if isinstance(a, Weight) else a for a in args)
    args = tuple(a.value if isinstance(a, Known) else a for a in args)
    if any(isinstance(a, Tensor) for a in args) and "_as" not in str(reader.node.target):
        return reader.unknown(x, *args)
    target: Any = reader.node.target
    if "view" in str(target) and "_as" not in str(target):
        if args and isinstance(args[0], torch.dtype):
            return labels
        target = torch.ops.aten.reshape.default
    result = target(labels, *args, **kwargs)
    if isinstance(result, tuple | list):
        return tuple(tidy(part) for part in result)
    return tidy(result)


@rule("select")
def select(reader: Reader, x: Any, dim: int, index: int) -> Tensor:
    """One index along a dimension; it must stay if there are others."""
    labels = reader.labels_of(x)
    result = tidy(labels.select(dim, index))
    only = torch.unique(small([result])[0])
    reader.must_not_vary(labels, [dim], f"{reader.where} picks it by its number", only=only)
    return result


@rule("unbind")
def unbind(reader: Reader, x: Any, dim: int = 0) -> tuple[Tensor, ...]:
    """Every index along a dimension; all must stay or go."""
    labels = reader.labels_of(x)
    reader.must_not_vary(labels, [dim], f"{reader.where} takes it apart one by one")
    return tuple(tidy(part) for part in labels.unbind(dim))


@rule("getitem")
def getitem(reader: Reader, values: Any, index: Any) -> Any:
    """Pick one of several results."""
    return values[index] if isinstance(values, tuple | list) else reader.unknown(values)


@rule("cat", "concat")
def cat(reader: Reader, tensors: Sequence[Any], dim: int = 0) -> Tensor:
    """Join label tensors; dimensions along which none varies stay small."""
    parts = [reader.labels_of(t) for t in tensors]
    parts = [p for p in parts if p.dim() > 1 or p.numel()]
    dim %= parts[0].dim()
    shape = list(parts[0].shape)
    shape[dim] = sum(p.shape[dim] for p in parts)
    for d in range(len(shape)):
        if d != dim and all(p.stride(d) == 0 or p.shape[d] == 1 for p in parts):
            parts = [p.narrow(d, 0, 1) for p in parts]
    return torch.cat(parts, dim).expand(shape)


@rule("stack")
def stack(reader: Reader, tensors: Sequence[Any], dim: int = 0) -> Tensor:
    """Join label tensors along a new dimension."""
    return tidy(torch.stack([reader.labels_of(t) for t in tensors], dim))


@rule("roll")
def roll(reader: Reader, x: Any, shifts: Any, dims: Any = ()) -> Tensor:
    """A shifted dimension must keep its size."""
    labels = reader.labels_of(x)
    dims = [dims] if isinstance(dims, int) else list(dims) or list(range(labels.dim()))
    reader.must_not_vary(labels, dims, f"{reader.where} shifts it by a fixed number")
    return labels


@rule("index", "index_select", "gather", "_unsafe_index")
def index(reader: Reader, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Fixed positions: a list of them along one dimension, or labels must not vary there."""
    assert reader.node is not None
    labels = reader.labels_of(x)
    name = str(reader.node.target)
    if "index.Tensor" not in name and "index_select" not in name:
        return reader.unknown(x, *args)
    if "index_select" in name:
        dim, positions = args
        places: list[Any] = [None] * (dim % labels.dim()) + [positions]
    else:
        places = list(args[0])
    if any(isinstance(p, Tensor | Weight) for p in places):
        return reader.unknown(x)
    dims = [d for d, p in enumerate(places) if p is not None]
    if len(dims) > 1 or places[dims[0]].value.dim() != 1:
        reader.must_not_vary(labels, dims, f"{reader.where} picks fixed positions of it")
    where = [slice(None) if p is None else p.value.cpu() for p in places]
    picked: Tensor = labels[tuple(where)]
    return tidy(picked)


@rule("copy")
def copy(reader: Reader, x: Any, source: Any, *_: Any) -> Tensor:
    """What is written takes the place of what was there, shape by shape."""
    return combine(reader, x, source, lambda _, new: np.minimum(new, Dead.VARIES))


@rule("expand_as")
def expand_as(reader: Reader, x: Any, other: Any) -> Tensor:
    """Takes the size of another tensor, and follows it."""
    result: Tensor = copy(reader, other, x)
    return result


@rule("slice_scatter")
def slice_scatter(
    reader: Reader,
    x: Any,
    source: Any,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Tensor:
    """Write into a part; sizes of the part and of what is written change together."""
    labels = reader.labels_of(x)
    part = (slice(None),) * (dim % labels.dim()) + (slice(start, end, step),)
    written = copy(reader, tidy(labels[part]), source)
    result = labels.contiguous()
    result[part] = written
    return tidy(result)


@rule("pad", "constant_pad_nd")
def pad(
    reader: Reader, x: Any, sizes: Sequence[int], mode: Any = "constant", value: Any = None
) -> Any:
    """Padding beside a channel belongs to it; padded channels belong to nobody."""
    labels = reader.labels_of(x)
    shape = list(labels.shape)
    number = value if not isinstance(mode, int | float) or isinstance(mode, bool) else mode
    constant = not isinstance(mode, str) or mode == "constant"
    for place in range(len(sizes) // 2):
        dim = labels.dim() - 1 - place
        before, after = sizes[2 * place : 2 * place + 2]
        shape[dim] += before + after
        if not (before or after):
            continue
        if bool((small([labels])[0].narrow(dim, 0, 1) == small([labels])[0]).all()):
            labels = labels.narrow(dim, 0, 1).expand(
                [shape[dim] if d == dim else n for d, n in enumerate(labels.shape)]
            )
        elif constant:
            labels = nn.functional.pad(labels, [0, 0] * place + [before, after])
        else:
            return reader.unknown(x)
    if not constant:
        return labels.expand(shape)
    if number:
        return reader.derive(labels, lambda dead: np.full_like(dead, Dead.VARIES))
    return reader.derive(labels, lambda dead: np.where(dead == Dead.ZERO, 0, Dead.VARIES))


def spread(reader: Reader, x: Any, dims: int) -> Tensor:
    """Labels of an operation that works channel by channel and changes ``dims`` spatial sizes."""
    labels = reader.labels_of(x)
    dim = labels.dim() - dims - 1
    return along(reader.channels(labels, dim), dim, reader.out_shape)
