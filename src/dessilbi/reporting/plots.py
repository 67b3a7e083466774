# SPDX-License-Identifier: Apache-2.0
"""Plots: the figures of a page as files, SVG by hand or PNG by matplotlib, in the same colours."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path as FilePath
from textwrap import fill
from typing import Any, Literal

from dessilbi.files.runs import free_path
from dessilbi.files.storage import write_atomic
from dessilbi.reporting import palette
from dessilbi.reporting.charts import Axis, Chart, EntryMap, Figure, FilterSheet
from dessilbi.reporting.svg import to_svg

Format = Literal["svg", "png"]
ACROSS = 8  # filters in a row
MISSING = "pictures need matplotlib, which is not installed: pip install 'dessilbi[figures]'"


def save_figures(
    figures: Mapping[str, Figure], folder: FilePath, file_format: Format
) -> list[FilePath]:
    """Write each figure to a file of its own; nothing is overwritten.

    Args:
        figures: By name.
        folder: Made where it is missing.
        file_format: "svg" or "png".

    Raises:
        ImportError: PNG was asked for, and matplotlib is not installed.
        OSError: The folder cannot be written.
    """
    if file_format == "png":
        check_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in figures.items():
        file = free_path(folder, _file_name(name), f".{file_format}")
        if file_format == "svg":
            write_atomic(file, str(to_svg(figure, "figure", alone=True)).encode())
        else:
            _draw(figure, file)
        files.append(file)
    return files


def check_matplotlib() -> None:
    """Raise an ImportError of one sentence where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ImportError(MISSING) from None


def _file_name(name: str) -> str:
    """A name that every file system takes, whatever a layer is called."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:120] or "figure"


def _draw(figure: Figure, file: FilePath) -> None:
    from matplotlib.figure import Figure as Canvas

    tall = 0.9 + _rows_of(figure) * 0.95 if isinstance(figure, FilterSheet) else 4.4
    canvas = Canvas(figsize=(6.4, tall), layout="constrained", dpi=180)
    canvas.suptitle(_plain(fill(figure.title, 66)), fontsize=10, x=0.02, ha="left")
    if isinstance(figure, Chart):
        _curves(canvas.subplots(), figure)
    elif isinstance(figure, EntryMap):
        _rows(canvas.subplots(), figure)
    else:
        _tiles(canvas, figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a hostile name
        canvas.savefig(file)


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def _curves(axes: Any, chart: Chart) -> None:
    for line in chart.lines:
        dash = [float(v) for v in line.dash.split()]
        axes.plot(
            [x for x, _ in line.points],
            [y for _, y in line.points],
            color=palette.TONES[line.tone].light,
            label=_plain(line.label) if line.label else "_",
            lw=0.7 if line.thin else 1.5,
            ls=(0, [v / 1.5 for v in dash]) if dash else "-",
            marker="o" if line.dots or len(line.points) == 1 else None,
            ms=3.5,
            drawstyle="steps-post" if line.steps else "default",
        )
    for mark in chart.marks:
        axes.axvline(mark.x, color=palette.TONES[mark.tone].light, lw=0.9, ls=":")
        axes.annotate(
            _plain(mark.label),
            (mark.x, 0.02),
            xycoords=("data", "axes fraction"),
            fontsize=7,
            rotation=90,
            ha="right",
            va="bottom",
        )
    _scale(axes, "x", chart.x)
    _scale(axes, "y", chart.y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    if any(line.label for line in chart.lines):
        axes.legend(fontsize=8, frameon=False)


def _scale(axes: Any, which: str, axis: Axis) -> None:
    """Place values as the page does: where they lie on its axis, from 0 to 1."""
    import numpy as np

    scale = axis.scale
    low, high = scale.low, scale.high
    if scale.kind == "error":
        getattr(axes, f"set_{which}scale")(
            "function", functions=(lambda v: -np.log10(1 - v), lambda v: 1 - 10.0**-v)
        )
    elif scale.kind == "log":
        getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    ticks = scale.ticks()
    words = [f"{100 * v:.6g}" if axis.percent else f"{v:,.6g}" for v in ticks]
    getattr(axes, f"set_{which}ticks")(ticks, words)
    getattr(axes, f"{which}axis").set_minor_locator(_none())
    getattr(axes, f"set_{which}label")(_plain(axis.label))


def _none() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _rows(axes: Any, figure: EntryMap) -> None:
    for row, strip in enumerate(figure.strips):
        colours = [
            palette.rgb(palette.TONES["empty"].light)
            if cell is None
            else palette.between(palette.RAMP, cell)
            for cell in strip.cells
        ]
        axes.imshow([colours], aspect="auto", extent=(0, 1, row + 0.45, row - 0.45))
    every = max(1, len(figure.strips) // 30)
    places = range(0, len(figure.strips), every)
    axes.set_yticks(places, [_plain(figure.strips[i].label) for i in places], fontsize=7)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(figure.strips) - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_xlabel(
        f"blocks in order of entry; from blue ({figure.first}) to yellow ({figure.last}), grey: "
        f"never"
    )


def _rows_of(figure: FilterSheet) -> int:
    return -(-len(figure.tiles) // ACROSS)


def _tiles(canvas: Any, figure: FilterSheet) -> None:
    grid = canvas.subplots(_rows_of(figure), ACROSS, squeeze=False)
    for axes in grid.flat[len(figure.tiles) :]:
        axes.set_axis_off()
    for axes, tile in zip(grid.flat, figure.tiles, strict=False):
        axes.imshow(tile.pixels)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_linestyle("-" if tile.alive else "--")
        axes.set_title(tile.label + ("" if tile.alive else "\n(dead)"), fontsize=6)
