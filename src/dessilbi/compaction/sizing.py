# SPDX-License-Identifier: Apache-2.0
"""Sizing: which attributes of modules must follow a cut, so that forward works.

An attribute that equals an old size may hold that size, or be a number of its own that happens to
be the same: a divisor, a count of warm-up steps. So the fewest are changed that forward needs.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from dessilbi.compaction.blueprint import Size

FEW = 5  # attributes of which all subsets are tried


def needed(
    sizes: Sequence[Size], works: Callable[[tuple[Size, ...]], bool]
) -> tuple[Size, ...] | None:
    """Return the fewest sizes that must change; None if none do.

    Attributes of repeated parts (``blocks.0.width``, ``blocks.1.width``) change together. Where
    there are many different ones, all change, and then those that need not are let off.

    >>> width, warm = Size("", "width", 8, 4), Size("", "warm", 8, 4)
    >>> needed([warm, width], lambda some: width in some) == (width,)
    True
    """
    groups: dict[tuple[str, str], list[Size]] = {}
    for size in sizes:
        key = re.sub(r"\b\d+\b", "*", size.module), size.attribute
        groups.setdefault(key, []).append(size)
    parts = [tuple(group) for group in groups.values()]
    if len(parts) > FEW:
        return _let_off(parts, works)
    return next((some for some in _subsets(parts) if works(some)), None)


def _subsets(parts: Sequence[tuple[Size, ...]]) -> Iterator[tuple[Size, ...]]:
    for count in range(1, len(parts) + 1):
        yield from (sum(some, ()) for some in combinations(parts, count))


def _let_off(
    parts: Sequence[tuple[Size, ...]], works: Callable[[tuple[Size, ...]], bool]
) -> tuple[Size, ...] | None:
    starts = [list(parts), *([p for p in parts if p is not one] for one in parts)]
    kept = next((some for some in starts if works(sum(some, ()))), None)
    if kept is None:
        return None
    for part in parts:
        fewer = [other for other in kept if other is not part]
        if fewer and works(sum(fewer, ())):
            kept = fewer
    return sum(kept, ())


def told(changed: Sequence[Size], offered: Sequence[Size]) -> list[str]:
    """Say which attributes follow a cut, and which of the same size do not.

    >>> told([Size("", "width", 8, 4)], [Size("", "width", 8, 4)])
    ['attributes that follow the cut: width (8 to 4)']
    """
    follow = _names(changed, lambda size: f"{size.old} to {size.new}")
    left = _names([s for s in offered if s not in changed], lambda size: str(size.old))
    notes = [f"attributes that follow the cut: {follow}"] if follow else []
    return notes + ([f"equal to an old size but not needed, so left: {left}"] if left else [])


def _names(sizes: Sequence[Size], value: Callable[[Size], str]) -> str:
    names = [f"{size.module}.{size.attribute}".lstrip(".") + f" ({value(size)})" for size in sizes]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
