# SPDX-License-Identifier: Apache-2.0
"""Rules for layers that own weights: convolutions, linear layers, embeddings, norms."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from dessilbi.graph.labels import Axis, Dead, Ids, along, blank, small
from dessilbi.graph.reader import Constant, Even, Known, Reader, Weight, rule


def consume(reader: Reader, axis: Axis, ids: Ids, *, foldable: bool) -> None:
    """Let the columns of a weight read labelled channels (what is 0 when dead may go)."""
    labels = reader.labels
    dead = labels.dead[ids]
    labels.merge(labels.axis(axis), ids, f"{reader.where} reads what cannot be removed")
    labels.require(ids)
    labels.freeze(ids[dead == Dead.VARIES], f"{reader.where} reads it and it is not 0 when dead")
    if (dead == Dead.CONSTANT).any():
        assert reader.node is not None
        constant = np.where(dead == Dead.CONSTANT, ids, 0)
        reader.constants.append(Constant(axis, constant, foldable, reader.node.name))


def produce(reader: Reader, axis: Axis, bias: Any, dim: int, shape: Sequence[int]) -> Tensor:
    """Return the labels of a layer's output: one per row, 0 when dead once the bias is masked."""
    rows = reader.labels.axis(axis)
    if bias is None or reader.follow(bias, 0, rows, "follower"):
        return along(rows, dim, shape)
    return along(reader.successors(rows, Dead.CONSTANT), dim, shape)


@rule("conv1d", "conv2d", "conv3d")
def conv(
    reader: Reader,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """Rows are the filters, columns read the channels; grouped and depthwise forms included."""
    if not isinstance(weight, Weight):
        return reader.unknown(x, weight, bias, reason=f"{reader.where} has a computed weight")
    x = reader.labels_of(x)
    dim = x.dim() - len(weight.shape) + 1
    shape, rows = reader.out_shape, weight.shape[0]
    _count(reader, weight.name, prod(shape) * prod(weight.shape[1:]))
    ids = reader.channels(x, dim)
    if groups == len(ids) > 1:
        return _depthwise(reader, weight, bias, ids, dim, shape)
    unpadded = padding == "valid" or (
        not isinstance(padding, str) and not np.any(np.asarray(padding))
    )
    axis = Axis(weight.name, 1, len(ids), "consumer", groups)
    consume(reader, axis, ids, foldable=unpadded)
    result = produce(reader, Axis(weight.name, 0, rows, "producer"), bias, dim, shape)
    if groups > 1:
        outputs = reader.labels.axis(Axis(weight.name, 0, rows, "producer"))
        even = Even(weight.name, ids.reshape(groups, -1), outputs.reshape(groups, -1))
        reader.evens.append(even)
    return result


def _depthwise(
    reader: Reader, weight: Weight, bias: Any, ids: Ids, dim: int, shape: Sequence[int]
) -> Tensor:
    """Every row belongs to one input channel and dies with it."""
    spread = np.repeat(ids, weight.shape[0] // len(ids))
    reader.follow(weight, 0, spread, "follower")
    closed = bias is None or reader.follow(bias, 0, spread, "follower")
    new = reader.successors(spread, Dead.ZERO if closed else Dead.CONSTANT)
    return along(new, dim, shape)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(
    reader: Reader,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    """Filters lie in dimension 1; the border sees fewer taps, so constants cannot be folded."""
    if not isinstance(weight, Weight):
        return reader.unknown(x, weight, bias, reason=f"{reader.where} has a computed weight")
    x = reader.labels_of(x)
    dim = x.dim() - len(weight.shape) + 1
    shape = reader.out_shape
    _count(reader, weight.name, prod(x.shape) * prod(weight.shape[1:]))
    ids = reader.channels(x, dim)
    if groups == len(ids) > 1 and weight.shape[1] == 1:
        return _depthwise(reader, weight, bias, ids, dim, shape)
    if groups > 1:
        return reader.unknown(x, bias, reason=f"{reader.where} is a grouped transposed convolution")
    constant = ids[reader.labels.dead[ids] != Dead.ZERO]
    reader.labels.freeze(constant, f"{reader.where} reads it and it is not 0 when dead")
    consume(reader, Axis(weight.name, 0, len(ids), "consumer"), ids, foldable=False)
    return produce(reader, Axis(weight.name, 1, weight.shape[1], "producer"), bias, dim, shape)


@rule("linear")
def linear(reader: Reader, x: Any, weight: Any, bias: Any = None) -> Any:
    """Rows are the neurons, columns read the last dimension."""
    if not isinstance(weight, Weight):
        return reader.unknown(x, weight, bias, reason=f"{reader.where} has a computed weight")
    x = reader.labels_of(x)
    _count(reader, weight.name, prod(reader.out_shape) * weight.shape[1])
    ids = reader.channels(x, -1)
    consume(reader, Axis(weight.name, 1, len(ids), "consumer"), ids, foldable=True)
    return produce(
        reader, Axis(weight.name, 0, weight.shape[0], "producer"), bias, -1, reader.out_shape
    )


@rule("embedding")
def embedding(reader: Reader, weight: Any, index: Any, *_: Any, **__: Any) -> Any:
    """The columns of the table are the features it writes."""
    if not isinstance(weight, Weight):
        return reader.unknown(weight, index)
    rows = reader.labels.axis(Axis(weight.name, 0, weight.shape[0], "consumer"))
    reader.labels.freeze(rows, f"{reader.where} looks it up by number")
    axis = Axis(weight.name, 1, weight.shape[1], "embedding")
    return along(reader.labels.axis(axis), -1, reader.out_shape)


@rule("batch_norm", "instance_norm")
def batch_norm(
    reader: Reader, x: Any, weight: Any, bias: Any, mean: Any, var: Any, *_: Any, **__: Any
) -> Tensor:
    """Every channel by itself; masking its affine makes a dead channel exactly 0."""
    ids = reader.channels(reader.labels_of(x), 1)
    for value, role in ((weight, "follower"), (bias, "follower")):
        reader.follow(value, 0, ids, role)
    for value in (mean, var):
        reader.follow(value, 0, ids, "statistic")
    closed = isinstance(weight, Weight) and isinstance(bias, Weight)
    old = reader.labels.dead[ids]
    dead: Any = Dead.ZERO if closed else np.maximum(old, Dead.CONSTANT)
    return along(reader.successors(ids, dead), 1, reader.out_shape)


@rule("_native_batch_norm_legit_no_training")
def native_batch_norm(reader: Reader, *args: Any) -> Any:
    """The same, as decomposed programs write it."""
    return batch_norm(reader, *args), blank((0,)), blank((0,))


@rule("group_norm")
def group_norm(
    reader: Reader, x: Any, groups: int, weight: Any = None, bias: Any = None, *_: Any, **__: Any
) -> Tensor:
    """Only whole norm groups can go: their statistics belong together."""
    ids = reader.channels(reader.labels_of(x), 1)
    if groups == 1:
        reader.labels.freeze(ids, f"{reader.where} takes its statistics over it")
    rows = ids.reshape(groups, -1)
    reader.labels.merge(
        rows[:, :1].repeat(rows.shape[1], axis=1),
        rows,
        f"{reader.where} takes its statistics over it together with what cannot be removed",
    )
    reader.labels.require(ids)
    for value in (weight, bias):
        reader.follow(value, 0, ids, "follower")
    closed = isinstance(weight, Weight) and isinstance(bias, Weight)
    old = reader.labels.dead[ids]
    worst = old.reshape(groups, -1).max(axis=1).repeat(rows.shape[1])
    dead: Any = Dead.ZERO if closed else worst
    return along(reader.successors(ids, dead), 1, reader.out_shape)


@rule("layer_norm", "rms_norm")
def layer_norm(reader: Reader, x: Any, shape: Sequence[int], *affine: Any, **_: Any) -> Tensor:
    """Statistics over the last dimensions: what varies along them lives or dies as a whole."""
    labels = reader.labels_of(x)
    dims = list(range(labels.dim() - len(shape), labels.dim()))
    core = small([labels])[0]
    reason = f"{reader.where} takes its statistics over it"
    if all(size == 1 for size in core.shape[: dims[0]]):
        reader.labels.freeze(core.numpy(), reason)
        return blank(labels.shape)
    rows = core.reshape(*core.shape[: dims[0]], -1)
    first = rows[..., :1].expand(rows.shape)
    reader.labels.merge(first.numpy(), rows.numpy(), reason)
    reader.labels.require(core.numpy())
    roots = reader.labels.roots(core.numpy())
    if (roots == roots.flat[0]).all():
        reader.labels.freeze(roots, reason)
        return blank(labels.shape)
    return reader.derive(labels, lambda dead: np.full_like(dead, Dead.VARIES))


@rule("prelu")
def prelu(reader: Reader, x: Any, weight: Any) -> Any:
    """A slope per channel, or one for all; 0 stays 0."""
    labels = reader.labels_of(x)
    if isinstance(weight, Weight) and weight.shape[0] > 1:
        reader.follow(weight, 0, reader.channels(labels, 1), "follower")
    elif not isinstance(weight, Weight | Known):
        return reader.unknown(x, weight)
    return labels


def _count(reader: Reader, name: str, macs: int) -> None:
    reader.macs[name] = reader.macs.get(name, 0) + macs // max(1, reader.batch)
