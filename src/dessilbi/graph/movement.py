# SPDX-License-Identifier: Apache-2.0
"""Rules for operations that only move elements: they run on the label tensors themselves."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dessilbi.graph.labels import Dead, along, blank, small, tidy
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
    "select",
    "narrow",
    "movedim",
    "swapaxes",
    "swapdims",
    "flip",
    "repeat",
    "split",
    "split_with_sizes",
    "chunk",
    "tensor_split",
    "unbind",
    "pixel_shuffle",
    "pixel_unshuffle",
    "unsafe_chunk",
    "unsafe_split",
    "repeat_interleave",
    "view_as",
    "expand_as",
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


@rule("getitem")
def getitem(reader: Reader, values: Any, index: Any) -> Any:
    """Pick one of several results."""
    return values[index]


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
    """Fixed positions: labels must not vary along the indexed dimensions."""
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
    reader.must_not_vary(labels, dims, f"{reader.where} picks fixed positions of it")
    where = [slice(None) if p is None else p.value for p in places]
    return tidy(labels[tuple(where)])


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


@rule("new_zeros", "zeros_like", "new_ones", "ones_like", "full_like", "new_full", "new_empty")
def filled(reader: Reader, *_: Any, **__: Any) -> Tensor:
    """Of a fixed size, whatever it was shaped after."""
    return blank(reader.out_shape)


def spread(reader: Reader, x: Any, dims: int) -> Tensor:
    """Labels of an operation that works channel by channel and changes ``dims`` spatial sizes."""
    labels = reader.labels_of(x)
    dim = labels.dim() - dims - 1
    return along(reader.channels(labels, dim), dim, reader.out_shape)
