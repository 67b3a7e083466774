# SPDX-License-Identifier: Apache-2.0
"""Rules for products of two activations: matmul, einsum and attention."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dessilbi.graph.elementwise import combine, softmax
from dessilbi.graph.labels import Dead, small
from dessilbi.graph.layers import dense
from dessilbi.graph.reader import Reader, Weight, rule


@rule("matmul", "bmm", "mm")
def matmul(reader: Reader, a: Any, b: Any) -> Any:
    """out[.., i, j] = sum over k of a[.., i, k] b[.., k, j].

    Labels that vary along k only are contracted away, pair by pair. Labels that also vary along
    another dimension (heads) are merged along k and live on in the result.
    """
    if isinstance(b, Weight) and len(b.shape) == 2 and not isinstance(a, Weight):
        return dense(reader, a, b, None, rows=1)
    one, two = reader.labels_of(a), reader.labels_of(b)
    if one.dim() < 2 or two.dim() < 2:
        return reader.unknown(a, b)
    left, right = one.unsqueeze(-1), two.unsqueeze(-3)  # (.., i, k, 1) and (.., 1, k, j)
    return _contract(reader, left, right, [-2])


@rule("einsum")
def einsum(reader: Reader, equation: str, tensors: Sequence[Any], **_: Any) -> Any:
    """Products summed over letters; the equation holds no sizes, so nothing else follows."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    plain = arrow and "." not in equation and len(terms) <= 2
    if not plain or any(len(set(term)) < len(term) for term in terms):
        return reader.unknown(tensors)
    letters = [*output, *sorted(set(inputs) - {*output, ","})]
    spread = [
        _spread(reader.labels_of(tensor), term, letters)
        for tensor, term in zip(tensors, terms, strict=True)
    ]
    dims = range(len(output), len(letters))
    if len(spread) == 1:
        return _drop(reader.add_up(spread[0], list(dims)), dims)
    return _contract(reader, spread[0], spread[1], list(dims))


def _spread(labels: Tensor, term: str, letters: Sequence[str]) -> Tensor:
    """Give every letter its dimension, size 1 where the term does not have it."""
    order = [term.index(letter) for letter in letters if letter in term]
    places = tuple(slice(None) if letter in term else None for letter in letters)
    return labels.permute(order)[places]


def _contract(reader: Reader, left: Tensor, right: Tensor, dims: list[int]) -> Tensor:
    """Sum the products of two broadcastable tensors over ``dims``."""
    shape: torch.Size = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
        left.shape, right.shape
    )
    dims = sorted(d % len(shape) for d in dims)
    own = [[d + t.dim() - len(shape) for d in dims] for t in (left, right)]
    inside = [[d for d in ds if d >= 0] for ds in own]
    if not any(reader.varies(t, ds) for t, ds in zip((left, right), inside, strict=True)):
        left, right = (
            reader.collapse(t, ds, "") if ds else t
            for t, ds in zip((left, right), inside, strict=True)
        )
    product = combine(reader, left, right, _product, gate=True)
    return _drop(reader.add_up(product, dims), dims)


def _drop(labels: Tensor, dims: Sequence[int]) -> Tensor:
    for dim in sorted(dims, reverse=True):
        labels = labels.squeeze(dim)
    return labels


def _product(a: Any, b: Any) -> Any:
    zero = (a == Dead.ZERO) | (b == Dead.ZERO)
    return np.where(zero, Dead.ZERO, Dead.VARIES)


@rule("scaled_dot_product_attention")
def attention(
    reader: Reader,
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    **options: Any,
) -> Any:
    """Heads: scores from q and k, softmax, values; the size of a head never changes."""
    query, key = reader.labels_of(q), reader.labels_of(k)
    value = reader.labels_of(v)
    if options.get("enable_gqa"):
        repeat = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(repeat, -3) for t in (key, value))
    for labels in (query, key):
        _tie_head(reader, labels)
    scores: Tensor = matmul(reader, query, key.transpose(-1, -2))
    if isinstance(mask, Tensor | Weight):
        scores = combine(reader, scores, mask, lambda a, b: np.full_like(a, Dead.VARIES))
    return matmul(reader, softmax(reader, scores, -1), value)


def _tie_head(reader: Reader, labels: Tensor) -> None:
    """The scale 1 / sqrt(head size) fixes the size of a head."""
    core = small([labels])[0]
    if core.shape[-1] > 1:
        reason = f"{reader.where} scales by its size"
        first = core.narrow(-1, 0, 1).expand(core.shape)
        reader.labels.merge(first.numpy(), core.numpy(), reason)
        if all(size == 1 for size in core.shape[:-1]):
            reader.labels.freeze(core.numpy(), reason)
