# SPDX-License-Identifier: Apache-2.0
"""Rules for products of two activations: matmul and attention."""

from typing import Any

import numpy as np
from torch import Tensor

from dessilbi.graph.elementwise import combine, softmax
from dessilbi.graph.labels import Dead, blank, small
from dessilbi.graph.reader import Reader, Weight, rule


@rule("matmul", "bmm", "mm")
def matmul(reader: Reader, a: Any, b: Any) -> Any:
    """out[.., i, j] = sum over k of a[.., i, k] b[.., k, j].

    Labels that vary along k only are contracted away, pair by pair. Labels that also vary along
    another dimension (heads) are merged along k and live on in the result.
    """
    one, two = reader.labels_of(a), reader.labels_of(b)
    if one.dim() < 2 or two.dim() < 2:
        return reader.unknown(a, b)
    left, right = one.unsqueeze(-1), two.unsqueeze(-3)  # (.., i, k, 1) and (.., 1, k, j)
    if _varies(reader, left, -2) or _varies(reader, right, -2):
        return _contract(reader, left, right)
    left = reader.collapse(left, [-2], "").squeeze(-2)
    right = reader.collapse(right, [-2], "").squeeze(-2)
    return combine(reader, left, right, _product, gate=True)


def _product(a: Any, b: Any) -> Any:
    zero = (a == Dead.ZERO) | (b == Dead.ZERO)
    return np.where(zero, Dead.ZERO, Dead.VARIES)


def _varies(reader: Reader, labels: Tensor, dim: int) -> bool:
    core = small([labels])[0]
    roots = reader.labels.roots(core.numpy())
    return bool((roots != roots.take([0], axis=dim)).any())


def _contract(reader: Reader, left: Tensor, right: Tensor) -> Tensor:
    """Products over labelled indices: what is paired merges and one side must be 0 when dead."""
    product = combine(reader, left, right, _product, gate=True)
    core = small([product])[0]
    others = [d for d in range(core.dim()) if d != core.dim() - 2]
    status = reader.labels.dead[core.numpy()]
    reason = f"{reader.where} sums over it and it is not 0 when dead"
    reader.labels.freeze(core.numpy()[status != Dead.ZERO], reason)
    reader.labels.require(core.numpy())
    shape = [n for d, n in enumerate(product.shape) if d != product.dim() - 2]
    if not any(_varies(reader, core, d) for d in others if core.shape[d] > 1):
        return blank(shape)
    first = core.narrow(-2, 0, 1)
    why = f"{reader.where} sums over it together with what cannot be removed"
    reader.labels.merge(first.expand(core.shape).numpy(), core.numpy(), why)
    return reader.collapse(product, [-2], why).squeeze(-2)


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
