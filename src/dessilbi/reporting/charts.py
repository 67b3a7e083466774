# SPDX-License-Identifier: Apache-2.0
"""Charts: figures as plain values, before anything draws them.

A title says the point of a figure and is computed from its data; ``told`` says in words what the
figure shows, for those who cannot see it, and ``table`` has its numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dessilbi.reporting.pixels import Pixel
from dessilbi.reporting.scales import Scale

Point = tuple[float, float]
Track = Literal["", "epoch", "density"]


@dataclass(frozen=True)
class Line:
    """A curve. Without a label it is in no legend; ``steps``: constant from one point to the next.

    Args:
        points: (x, y) in the order in which they are joined.
        tone: A name in ``palette.TONES``.
        label: In the legend.
        dash: An SVG dash pattern.
        dots: Mark the points.
        joined: Join them.
        thin: Many lines of one kind.
        steps: Constant from one point to the next.
    """

    points: Sequence[Point]
    tone: str = "ticket"
    label: str = ""
    dash: str = ""
    dots: bool = False
    joined: bool = True
    thin: bool = False
    steps: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line with a word beside it."""

    x: float
    label: str
    tone: str = "mark"


@dataclass(frozen=True)
class Axis:
    """What an axis shows; ``percent``: ticks of fractions are told in percent."""

    label: str
    scale: Scale
    percent: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Table:
    """The numbers of a figure."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """Curves over an axis.

    ``track``: the quantity along x that the slider of a page can point to.
    """

    name: str
    title: str
    told: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    table: Table | None = None
    note: str = ""
    track: Track = ""


@dataclass(frozen=True)
class Strip:
    """A row of an entry map: for each cell the share (0 to 1) of the run at entry; None: never."""

    label: str
    cells: Sequence[float | None]


@dataclass(frozen=True)
class EntryMap:
    """When the blocks of every layer entered: a row for each layer, cells in order of entry."""

    name: str
    title: str
    told: str
    strips: Sequence[Strip]
    first: str
    last: str
    table: Table | None = None
    note: str = ""


@dataclass(frozen=True)
class Tile:
    """A filter as an image, whether it lives, and a word under it.

    ``pixels``: rows of (red, green, blue, opacity); where nothing is, the ground shows.
    """

    pixels: Sequence[Sequence[Pixel]]
    alive: bool
    label: str


@dataclass(frozen=True)
class FilterSheet:
    """Filters as images, those that live first."""

    name: str
    title: str
    told: str
    tiles: Sequence[Tile]
    table: Table | None = None
    note: str = ""


Figure = Chart | EntryMap | FilterSheet
