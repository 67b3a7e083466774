# SPDX-License-Identifier: Apache-2.0
"""Text: lines of at most 80 columns in which alike names stand together."""

import re
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import TypeVar

from rich.cells import cell_len

from dessilbi.columns import WIDTH, paragraph, printable

T = TypeVar("T")


def families(values: Iterable[T], key: Callable[[T], object]) -> list[list[T]]:
    """Return the values in lists of equal keys, in the order in which these appear.

    >>> families(["b1", "a", "b2"], lambda name: name[0])
    [['b1', 'b2'], ['a']]
    """
    found: dict[object, list[T]] = {}
    for value in values:
        found.setdefault(key(value), []).append(value)
    return list(found.values())


def alike(name: str) -> str:
    """Return what names share that differ in numbers only.

    >>> alike("layer1.0.conv2.weight")
    'layer*.*.conv*.weight'
    """
    return re.sub(r"\d+", "*", name)


def common(names: Sequence[str]) -> str:
    """Return one text for names that are :func:`alike`, with the numbers in which they differ.

    >>> common([f"layer{i}.{j}.conv.weight" for i in (1, 2, 3, 5) for j in (0, 1)])
    'layer{1-3,5}.{0,1}.conv.weight'
    >>> common(["a.1.0", "a.2.1"])  # not all combinations
    'a.*.*'
    """
    columns = list(zip(*(re.split(r"(\d+)", name) for name in names), strict=True))
    numbers = {
        place: sorted({int(n) for n in columns[place]}) for place in range(len(columns))[1::2]
    }
    is_grid = prod(len(set(column)) for column in set(columns[1::2])) == len(set(names))
    text = ""
    for place, column in enumerate(columns):
        same = len(set(column)) == 1
        text += column[0] if same else _ranges(numbers[place]) if is_grid else "*"
    return text


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    told = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return "{" + ",".join(told) + "}"


def listed(names: Sequence[str], label: str = "") -> list[str]:
    """Return indented lines that list names, alike ones together."""
    told = []
    for family in families(names, alike):
        text = common(family)
        told.append(f"{text} ({len(family)})" if "*" in text else text)
    return indented(f"{label} {', '.join(told)}".strip(), 2)


def indented(text: str, by: int) -> list[str]:
    """Return ``text`` in lines of at most 80 columns; further lines are indented by 2 more."""
    return paragraph(text, " " * by, indent=by + 2).split("\n")


def row(text: str, cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Return a row of a table; a text too long for its column gets lines of its own."""
    right = "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    room, text = WIDTH - len(right), printable(text)
    if cell_len(text) < room:
        return [text + " " * (room - cell_len(text)) + right]
    return [*indented(text, 0), " " * room + right]


def percent(share: float) -> str:
    """Return a fraction in percent, with three digits where it is small.

    >>> percent(0.9987), percent(0.12), percent(0.000345), percent(0)
    ('99.9', '12.0', '0.0345', '0')
    """
    value = 100 * share
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"
