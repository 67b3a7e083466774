# SPDX-License-Identifier: Apache-2.0
"""Columns: names, curves and paragraphs in the width that a terminal has (no torch here)."""

import codecs
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

WIDTH = 80
LEVELS = "▁▂▃▄▅▆▇█"
GAP = "~"  # stands for what was left out of a name
# One character for each, so that columns stay where they are: a terminal without Greek letters,
# arrows, lines (of rich) and blocks shows these.
ASCII = dict(
    zip(
        LEVELS + "Γκλν·→‖±…×–─━╸╺",  # noqa: RUF001 - what else would a table of them hold
        ".:-=+*#@" + "Gkln.>|+~x-----",
        strict=True,
    )
)
SPELLED = "dessilbi.spelled"


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Stand in for what a stream cannot encode."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(ASCII.get(c, "?") for c in lost), error.end


codecs.register_error(SPELLED, _spell)


def printable(text: str) -> str:
    r"""Keep what files and their names say from moving the cursor or breaking the line.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shortened(name: str, width: int) -> str:
    """Return a name in at most ``width`` columns; what is left out of its middle is a "~".

    >>> shortened("features.denseblock4.layer16.conv2", 20)
    'features.d~r16.conv2'
    """
    name = printable(name)
    if cell_len(name) <= width:
        return name
    left = width // 2
    front = set_cell_size(name, left).rstrip()
    back = name[::-1]
    return front + GAP + set_cell_size(back, width - 1 - left).rstrip()[::-1]


def short_names(names: Sequence[str], width: int) -> list[str]:
    """Return names in at most ``width`` columns; different ones stay different.

    Where two would look alike, they get their place in the list: "features~2".

    >>> short_names(["stage.1.block.1.conv", "stage.2.block.1.conv", "fc"], 12)
    ['stage.~1', 'stage.~2', 'fc']
    """
    short = [shortened(name, width) for name in names]
    alike = {
        text
        for text in short
        if len({n for n, s in zip(names, short, strict=True) if s == text}) > 1
    }
    digits = len(str(len(names)))
    return [
        set_cell_size(text, max(1, width // 2)).rstrip() + GAP + str(place).zfill(digits)
        if text in alike
        else text
        for place, text in enumerate(short, 1)
    ]


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Return a curve in at most ``width`` characters, from the lowest value to the highest.

    Where there are more values than characters, each character is a mean; what is missing or not
    finite is a blank.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8), sparkline([1, None, 2], 8), sparkline([5, 5], 8)
    ('▁▂▃▄▅▆▇█', '▁ █', '▄▄')
    """
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)] if count else [0]
    means = [_mean(values[a:b]) for a, b in pairwise(edges)]
    known = [value for value in means if value is not None]
    if not known:
        return " " * count
    low, high = min(known), max(known)
    scale = (len(LEVELS) - 1) / (high - low) if high > low else 0.0
    middle = 0.0 if scale else len(LEVELS) // 2 - 1.0
    return "".join(
        " " if value is None else LEVELS[round(middle + (value - low) * scale)] for value in means
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def paragraph(text: str, label: str = "", *, indent: int | None = None) -> str:
    """Return a text in lines of at most 80 columns; what is too long for a line is broken.

    Args:
        text: The text.
        label: Stands before the first line.
        indent: Blanks before the others; by default as wide as the label.

    >>> print(paragraph("word " * 17, "told: "))
    told: word word word word word word word word word word word word word word word
          word word
    """
    indent, text = cell_len(label) if indent is None else indent, printable(text)
    first = _lines(text, WIDTH - cell_len(label))[0]
    others = _lines(text[len(first) :].strip(), WIDTH - indent) if first != text else []
    lines = [label + first, *(" " * indent + line for line in others)]
    return "\n".join(line.rstrip() for line in lines)


def _lines(text: str, width: int) -> list[str]:
    return [line.plain for line in Text(text).wrap(Console(width=WIDTH), width)] or [""]
