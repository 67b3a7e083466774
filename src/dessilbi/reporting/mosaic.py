# SPDX-License-Identifier: Apache-2.0
"""Mosaic: the filters of a layer as one figure, those that entered Gamma above the others."""

from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from torch import Tensor

from dessilbi.columns import shortened
from dessilbi.reporting.filters import Filter, Filters
from dessilbi.reporting.palette import BLUE, GREY
from dessilbi.reporting.plots import check_matplotlib

COLUMNS = 8, 12  # fewest, so that the titles have room, and most
INCH = 0.95  # of one image with its label
CAPTION = {
    "maximised": "what each answers to most",
    "weights": "weights",
}


def save_mosaic(filters: Filters, file: str | FilePath) -> None:
    """Draw the filters in the order of first entry, each with its index and epoch of entry.

    Args:
        filters: What to draw.
        file: Where to save; the ending (.svg, .png, .pdf) says the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The ending is not a known format, or the images are none.
        OSError: The file cannot be written.
    """
    check_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    parts = [(_above(filters), filters.entered, BLUE), (_below(filters), filters.never, GREY)]
    parts = [part for part in parts if part[1]]
    pictures = [[_picture(each.image) for each in members] for _, members, _ in parts]
    columns = max(min(COLUMNS), *(min(max(COLUMNS), len(members)) for _, members, _ in parts))
    rows = [-(-len(members) // columns) for _, members, _ in parts]
    height = INCH * sum(rows) + 0.45 * len(parts) + 0.6
    with rc_context({"svg.hashsalt": "dessilbi"}):  # else the ids in an SVG are drawn at random
        figure = Figure(figsize=(INCH * columns, height), layout="constrained")
        places = figure.subplots(len(parts), 1, squeeze=False, height_ratios=rows)[:, 0]
        for axes, (title, members, colour), images in zip(places, parts, pictures, strict=True):
            _draw(axes, members, images, columns, colour)
            axes.set_title(title, fontsize=10, loc="left", color=colour)
        figure.suptitle(_title(filters), fontsize=11, x=0.01, ha="left")
        is_svg = str(file).endswith(".svg")
        figure.savefig(file, dpi=110, metadata={"Date": None} if is_svg else None)


def _title(filters: Filters) -> str:
    left_out = filters.total - len(filters.filters)
    more = f" ({left_out} more are not shown)" if left_out else ""
    name = f"{shortened(filters.layer, 24)} of {shortened(filters.recipe, 24)}"
    name = name.replace("$", r"\$")  # whatever it holds, it is no formula
    return f"{name}: {CAPTION[filters.kind]}, each in its own range{more}"


def _above(filters: Filters) -> str:
    return (
        f"{filters.total_entered} of {filters.total} entered Γ, by first entry "
        f"(index · epoch; in brackets: has left again)"
    )


def _below(filters: Filters) -> str:
    return f"{filters.total - filters.total_entered} of {filters.total} never entered Γ (index)"


def _picture(image: Tensor) -> Any:
    """(channels, height, width) as (height, width, 3), stretched to [0, 1].

    Raises:
        ValueError: It has no two dimensions of space.
    """
    if image.dim() != 3:
        raise ValueError(
            f"inputs of shape {tuple(image.shape)} are no images (channels, height, width), and "
            f"cannot be drawn: ask for --json"
        )
    values = image.double().cpu().numpy()
    if len(values) not in (1, 3):  # e.g. many spectral bands: their mean
        values = values.mean(0, keepdims=True)
    low, high = values.min(), values.max()
    values = (values - low) / (high - low) if high > low else np.full_like(values, 0.5)
    return np.broadcast_to(values, (3, *values.shape[1:])).transpose(1, 2, 0)


def _draw(
    axes: Any, members: Sequence[Filter], images: Sequence[Any], columns: int, colour: str
) -> None:
    """Images in a grid on one pair of axes: quicker by far than axes for each."""
    rows = -(-len(members) // columns)
    for k, (each, image) in enumerate(zip(members, images, strict=True)):
        row, column = divmod(k, columns)
        left, right, bottom, top = column + 0.06, column + 0.94, row + 0.76, row + 0.0
        axes.imshow(image, extent=(left, right, bottom, top), interpolation="nearest")
        axes.text(column + 0.5, row + 0.87, _label(each), ha="center", va="center", fontsize=6.5)
        frame = ((left, right, right, left, left), (bottom, bottom, top, top, bottom))
        axes.plot(*frame, color=colour, lw=0.8)
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, -0.05)
    axes.set_aspect("auto")
    axes.set_axis_off()


def _label(each: Filter) -> str:
    if each.step is None:
        return f"#{each.index}"
    told = f"step {each.step}" if each.epoch is None else f"{each.epoch:.1f}"
    return f"#{each.index} · {told}" if each.stays else f"(#{each.index} · {told})"
