# SPDX-License-Identifier: Apache-2.0
"""Rules for layers that own weights: convolutions, linear layers, embeddings, norms."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from dessilbi.blocks.naming import bias_name
from dessilbi.graph.labels import Axis, Dead, Ids, along, blank, small
from dessilbi.graph.reader import Constant, Even, Known, Reader, Weight, rule


def consume(reader: Reader, axis: Axis, ids: Ids, bias: str | None = None) -> None:
    """Let the columns of a weight read labelled channels (what is 0 when dead may go).

    ``bias`` names what can take up constants; without it one column carries those of the others.
    """
    labels = reader.labels
    dead = labels.dead[ids]
    labels.merge(labels.axis(axis), ids, f"{reader.where} reads what cannot be removed")
    labels.require(ids)
    labels.freeze(ids[dead == Dead.VARIES], f"{reader.where} reads it and it is not 0 when dead")
    if (dead == Dead.CONSTANT).any():
        assert reader.node is not None
        constant = np.where(dead == Dead.CONSTANT, ids, 0)
        if reader.uses[axis.name] > 1:  # what moves into a weight would act at its other uses
            reason = f"{reader.where} reads a constant with a weight that is used elsewhere too"
            labels.freeze(constant, reason)
        reader.constants.append(Constant(axis, constant, bias, reader.node.name))


def taker(reader: Reader, weight: Weight, bias: Any) -> str | None:
    """Return the name of the bias that constants may be moved into, if it acts here alone."""
    if isinstance(bias, Weight):
        return bias.name if reader.uses[bias.name] == 1 else None
    name = bias_name(weight.name)
    return name if bias is None and name in reader.program.vacant else None


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
        return _depthwise(reader, weight, bias, ids, rows // len(ids), dim)
    unpadded = padding == "valid" or (
        not isinstance(padding, str) and not np.any(np.asarray(padding))
    )
    axis = Axis(weight.name, 1, len(ids), "consumer", groups)
    consume(reader, axis, ids, taker(reader, weight, bias) if unpadded else None)
    result = produce(reader, Axis(weight.name, 0, rows, "producer"), bias, dim, shape)
    if groups > 1:
        outputs = reader.labels.axis(Axis(weight.name, 0, rows, "producer"))
        even = Even(weight.name, ids.reshape(groups, -1), outputs.reshape(groups, -1))
        reader.evens.append(even)
    return result


def _depthwise(reader: Reader, weight: Weight, bias: Any, ids: Ids, times: int, dim: int) -> Tensor:
    """Every input channel has ``times`` outputs of its own, which die with it."""
    spread = np.repeat(ids, times)
    reader.follow(weight, 0, np.repeat(ids, weight.shape[0] // len(ids)), "follower")
    closed = bias is None or reader.follow(bias, 0, spread, "follower")
    new = reader.successors(spread, Dead.ZERO if closed else Dead.CONSTANT)
    return along(new, dim, reader.out_shape)


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
    if groups == len(ids) > 1:
        return _depthwise(reader, weight, bias, ids, weight.shape[1], dim)
    if groups > 1:
        return reader.unknown(x, bias, reason=f"{reader.where} is a grouped transposed convolution")
    constant = ids[reader.labels.dead[ids] != Dead.ZERO]
    reader.labels.freeze(constant, f"{reader.where} reads it and it is not 0 when dead")
    consume(reader, Axis(weight.name, 0, len(ids), "consumer"), ids)
    return produce(reader, Axis(weight.name, 1, weight.shape[1], "producer"), bias, dim, shape)


@rule("linear")
def linear(reader: Reader, x: Any, weight: Any, bias: Any = None) -> Any:
    """Rows are the neurons, columns read the last dimension."""
    return dense(reader, x, weight, bias, rows=0)


@rule("addmm")
def addmm(reader: Reader, bias: Any, x: Any, weight: Any, **scales: Any) -> Any:
    """A linear layer whose weight lies the other way round."""
    if scales:
        return reader.unknown(bias, x, weight)
    return dense(reader, x, weight, bias, rows=1)


def dense(reader: Reader, x: Any, weight: Any, bias: Any, *, rows: int) -> Any:
    """Neurons along dimension ``rows`` of a weight read the last dimension of ``x``."""
    if not isinstance(weight, Weight) or isinstance(x, Weight):
        return reader.unknown(x, weight, bias, reason=f"{reader.where} has a computed weight")
    if len(weight.shape) != 2:
        return reader.unknown(x, weight, bias)
    labels = reader.labels_of(x)
    height, width = weight.shape[rows], weight.shape[1 - rows]
    _count(reader, weight.name, prod(reader.out_shape) * width)
    ids = reader.channels(labels, -1)
    axis = Axis(weight.name, 1 - rows, width, "consumer")
    consume(reader, axis, ids, taker(reader, weight, bias))
    producer = Axis(weight.name, rows, height, "producer")
    return produce(reader, producer, bias, -1, reader.out_shape)


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
    for value in (weight, bias):
        reader.follow(value, 0, ids, "follower")
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


@rule("layer_norm")
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


@rule("rms_norm")
def rms_norm(
    reader: Reader, x: Any, shape: Sequence[int], weight: Any = None, eps: Any = None
) -> Tensor:
    """Zeros add nothing to the sum of squares: with its weight and eps rescaled, channels can go.

    With N of which N' stay: weight * sqrt(N / N') and eps * N / N'.
    """
    labels = reader.labels_of(x)
    core = small([labels])[0]
    ids = core.numpy().ravel()
    single = isinstance(weight, Weight) and len(shape) == 1 and core.numel() == core.shape[-1] > 1
    if not single:
        whole: Tensor = layer_norm(reader, x, shape, weight)
        return whole
    reason = f"{reader.where} takes its statistics over it"
    reader.labels.freeze(ids[reader.labels.dead[ids] != Dead.ZERO], f"{reason} and it is not 0")
    if reader.uses[weight.name] > 1:
        reader.labels.freeze(ids, f"{reason} with a weight that is used elsewhere too")
    reader.labels.require(ids)
    reader.follow(weight, 0, ids, "follower")
    reader.rescaled.add(weight.name)
    return along(reader.successors(ids, Dead.ZERO), -1, labels.shape)


@rule("_fused_rms_norm")
def fused_rms_norm(reader: Reader, *args: Any) -> Any:
    """The same, as decomposed programs write it."""
    return rms_norm(reader, *args), blank((0,))


@rule("prelu")
def prelu(reader: Reader, x: Any, weight: Any) -> Any:
    """A slope per channel, or one for all; 0 stays 0."""
    labels = reader.labels_of(x)
    if not isinstance(weight, Weight | Known):
        return reader.unknown(x, weight)
    if prod(weight.shape if isinstance(weight, Weight) else weight.value.shape) > 1:
        reader.follow(weight, 0, reader.channels(labels, 1), "follower")
    return labels


def _count(reader: Reader, name: str, macs: int) -> None:
    reader.macs[name] = reader.macs.get(name, 0) + macs
