# SPDX-License-Identifier: Apache-2.0
"""Comparing: how far the answers of one model are from another's, element by element.

One output may hold a masked logit of -1e9 beside one of 0.1, or a column that is 1e10 times
another. One scale for all would let the small ones be anything, so every element has its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TELLS = 1e-4  # what varies by less of its size is rounding, as far as we know
FAR = 1 / TELLS  # what is larger than most by this factor says nothing about them
COARSE = (
    4.0  # times what is typical: about the largest of many; rounding may do so much to small ones
)
TAIL = 64.0  # times its size: a small probability takes the error of its logit for its own
TINY = 1e-280  # below, float64 itself loses digits
HUGE = 3e38  # the largest number of float32 and that of float64 both stand for a mask
SAMPLE, CHUNK = 1 << 20, 1 << 20  # elements that are sorted, elements that are compared at once

Answers = Sequence[Sequence[Tensor]]  # per probe, every tensor the model returns


def compared(answer: Any) -> list[Tensor]:
    """Return the tensors in an answer of a model, in order; complex ones as pairs of real numbers.

    >>> compared({"a": torch.zeros(2, dtype=torch.complex64), "b": (torch.ones(1).bool(), None)})
    [tensor([[0., 0.],
            [0., 0.]]), tensor([True])]
    """
    return [_real(leaf) for leaf in _leaves(answer) if isinstance(leaf, Tensor)]


def unseen(answer: Any) -> list[str]:
    """Return the types in an answer that are not compared.

    >>> unseen((torch.ones(1), None, 3))
    ['int']
    """
    leaves = (x for x in _leaves(answer) if x is not None and not isinstance(x, Tensor))
    return sorted({type(leaf).__name__ for leaf in leaves})


def _leaves(answer: Any) -> list[Any]:
    if hasattr(answer, "__dataclass_fields__") and not isinstance(answer, type):
        answer = [getattr(answer, name) for name in answer.__dataclass_fields__]
    if isinstance(answer, Mapping):
        answer = list(answer.values())
    if isinstance(answer, list | tuple):
        return [leaf for value in answer for leaf in _leaves(value)]
    return [answer]


def _real(x: Tensor) -> Tensor:
    x = x.dequantize() if x.is_quantized else x
    x = x if x.layout == torch.strided else x.to_dense()
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


@dataclass(frozen=True)
class Gap:
    """How far answers are from those that were expected.

    Args:
        largest: Max |difference| of a number with a fraction; infinite where shapes, kinds or what
            is finite differ.
        relative: The largest of the outputs, each in its own scale, see :func:`compare`; of whole
            numbers and truth values the share that differs.
        outputs: Type and relative difference of every output.
    """

    largest: float
    relative: float
    outputs: tuple[tuple[torch.dtype, float], ...] = ()

    def within(self, allowed: Callable[[torch.dtype], float]) -> bool:
        """Whether no output differs by more than its type allows."""
        known = all(relative <= allowed(dtype) for dtype, relative in self.outputs)
        return known and self.relative < float("inf")

    def notes(self) -> list[str]:
        """Say which outputs of whole numbers differ at some places."""
        return [
            f"output {number} ({str(dtype).removeprefix('torch.')}) differs at {share:.1%} of its "
            f"places, as rounding may decide between near ties"
            for number, (dtype, share) in enumerate(self.outputs)
            if share and not dtype.is_floating_point
        ]


def rounding(dtype: torch.dtype) -> float:
    """Return what rounding in a type may do, generously; it may also decide between near ties."""
    return float(torch.finfo(dtype).eps ** 0.5) if dtype.is_floating_point else 0.05


def compare(expected: Answers, found: Answers, *, exact: bool = True) -> Gap:
    """Compare answers of two models to the same probes.

    The difference of every element is divided by how much that element varies over the probes, or,
    where it hardly does, by its own size. It is held to at most 1e4 times its size, and to no less
    than 1e-4 of what is typical: the third quartile of the distinct magnitudes of that output.
    So huge numbers hide little, and rounding is not counted in units of an accidental 0. An element
    far below the rounding of what is typical was not made from it: its own size counts.

    Args:
        expected: What one model answers, per probe.
        found: What the other answers.
        exact: Both in float64. Otherwise, as rounding in their own type is relative to what is
            typical, an element is held to four times that, or its own size (64 times that where it
            lies far below, as the tails of a softmax do).

    >>> logits = torch.tensor([1.0, 2.0, 4.0, -1e9])
    >>> wrong = torch.tensor([2.0, 2.0, 4.0, -1e9])
    >>> compare([[logits], [2 * logits]], [[wrong], [2 * logits]]).relative
    1.0
    """
    nowhere = Gap(float("inf"), float("inf"))
    if len(expected) != len(found) or any(
        len(mine) != len(theirs) for mine, theirs in zip(expected, found, strict=True)
    ):
        return nowhere
    blunt = 1.0 if sharpness(expected) > TELLS else 1e3
    kinds = zip(zip(*expected, strict=True), zip(*found, strict=True), strict=True)
    told = []
    for mine, theirs in kinds:
        if any(
            a.shape != b.shape or a.is_floating_point() != b.is_floating_point()
            for a, b in zip(mine, theirs, strict=True)
        ):
            return nowhere
        told.append((mine[0].dtype, _output(mine, theirs, blunt if exact else None)))
    outputs = tuple((dtype, relative) for dtype, (_, relative) in told)
    largest = max((gap for _, (gap, _) in told), default=0.0)
    return Gap(largest, max((relative for _, relative in outputs), default=0.0), outputs)


def difference(one: Answers, two: Answers) -> float:
    """Return max |a - b|, infinite where shapes or finiteness differ."""
    return compare(one, two).largest


def magnitude(found: Answers) -> float:
    """Return the largest finite |output|."""
    floats = (x for some in found for x in some if x.is_floating_point())
    values = (x[x.isfinite()].abs() for x in floats)
    return max((float(x.max()) for x in values if x.numel()), default=0.0)


def sharpness(found: Answers) -> float:
    """Return how much an output varies with the input relative to its size, at most."""
    best = 0.0
    for kind in zip(*found, strict=True):
        if not kind[0].is_floating_point():
            continue
        typical, most, size = _typical(kind), 0.0, 0.0
        for (values,) in _chunks(kind):
            spread, sizes, _ = _profile(values, typical)
            most, size = max(most, float(spread.max())), max(size, float(sizes.max()))
        best = max(best, most / size if size else 0.0)
    return best


def _output(
    mine: Sequence[Tensor], theirs: Sequence[Tensor], blunt: float | None
) -> tuple[float, float]:
    """Return the largest difference of one output, plain and relative."""
    if not mine[0].is_floating_point():
        wrong = sum(int((a != b.to(a.device)).sum()) for a, b in zip(mine, theirs, strict=True))
        return 0.0, wrong / max(1, sum(x.numel() for x in mine))
    typical, largest, relative = _typical(mine), 0.0, 0.0
    kind = torch.finfo(mine[0].dtype)
    # What a runtime may take for 0 is no difference in a type of its own.
    least = TINY if blunt is not None else kind.tiny / rounding(mine[0].dtype)
    for a, b in _chunks(mine, theirs):
        gap = torch.where(a == b, 0.0, (a - b).abs())
        gap = torch.where(gap.isnan(), float("inf"), gap)
        largest = max(largest, float(gap.max()))
        relative = max(relative, float((gap / _scale(a, typical, blunt, kind.eps, least)).max()))
    return largest, relative


def _scale(values: Tensor, typical: float, blunt: float | None, eps: float, least: float) -> Tensor:
    """Return what the difference of every element is divided by."""
    spread, size, plain = _profile(values, typical)
    own, sizes = size.expand_as(values), values.abs()
    if blunt is not None:
        own = torch.where(spread > TELLS * size, spread, blunt * size)
        own = torch.minimum(own, FAR * sizes)
    apart = (size > 0) & (size < eps / 128 * typical)
    if blunt is None:
        own = torch.where(apart, TAIL * own, own)
    floor = torch.where(apart, 0.0, (COARSE if blunt is None else TELLS) * typical)
    scale = torch.maximum(torch.where(plain, own, sizes), floor)
    scale = torch.where(scale > 0, scale.clamp_min(least), 1.0)
    return torch.where(values.isfinite(), scale, 1.0)


def _profile(values: Tensor, typical: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return spread and size of every element over the probes, and where its values are plain.

    A fill value of a mask is not: what it does to an element says nothing about the others of it.
    """
    plain = values.isfinite() & (values.abs() <= FAR * typical)
    high = torch.where(plain, values, -float("inf")).amax(0)
    low = torch.where(plain, values, float("inf")).amin(0)
    size = torch.where(plain, values.abs(), 0.0).amax(0)
    return (high - low).clamp_min(0.0), size, plain


def _typical(kind: Sequence[Tensor]) -> float:
    """Return the third quartile of the distinct magnitudes; a fill value is one of them."""
    stride = sum(x.numel() for x in kind) // SAMPLE + 1
    flat = [_bounded(x.detach().reshape(-1)[::stride].double()) for x in kind]
    sizes = torch.cat([x.to(flat[0].device).abs() for x in flat])
    distinct = torch.unique(sizes[sizes.isfinite() & (sizes > 0)])
    return float(distinct[3 * (len(distinct) - 1) // 4]) if len(distinct) else 0.0


def _chunks(*kinds: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Give out elements of outputs, a part at a time, in float64: a row per probe.

    Where their shapes depend on the probe, every probe is for itself.
    """
    flat = [[x.detach().reshape(-1) for x in kind] for kind in kinds]
    places = range(len(flat[0]))
    alike = len({x.shape for x in kinds[0]}) == 1
    for group in [places] if alike else [range(n, n + 1) for n in places]:
        first = flat[0][group[0]]
        for start in range(0, first.numel(), CHUNK):
            part = slice(start, start + CHUNK)
            yield tuple(
                _bounded(torch.stack([rows[n][part].double().to(first.device) for n in group]))
                for rows in flat
            )


def _bounded(values: Tensor) -> Tensor:
    return torch.where(values.isinf(), values, values.clamp(-HUGE, HUGE))
