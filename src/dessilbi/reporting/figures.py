# SPDX-License-Identifier: Apache-2.0
"""Figures of a run: the path from simple to complex, and the family of tickets."""

from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

from dessilbi.files.runs import Run
from dessilbi.files.sealing import read_sealed
from dessilbi.reporting.palette import BLUE, GREEN, GREY, ORANGE
from dessilbi.reporting.plots import check_matplotlib
from dessilbi.reporting.summary import Summary

LINE_STYLES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1)), (0, (5, 1)))


def save_path_figure(summary: Summary, file: str | FilePath) -> None:
    """Draw the path (density of each layer and accuracy over epochs) and, if known, the family.

    Args:
        summary: The run.
        file: Where to save; the ending (.svg, .png, .pdf) says the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The ending is not a known format, or the run has no judged points.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    rows = [row for row in summary.rows if row.epoch is not None]
    if not summary.judged:
        raise ValueError(f"{summary.folder} has no judged points to draw: let the run go on")
    family = _family(summary)
    figure = Figure(figsize=(10.5 if family else 7, 3.6), layout="constrained")
    axes = figure.subplots(1, 3 if family else 2)
    _draw_layers(axes[0], [row.epoch for row in rows], [row.layers for row in rows])
    _draw_accuracy(axes[1], [row.epoch for row in summary.judged], summary.judged)
    if family:
        _draw_family(axes[2], family)
    figure.savefig(file, metadata={"Date": None} if str(file).endswith(".svg") else None)


def _family(summary: Summary) -> dict[str, Any] | None:
    file = Run(summary.folder).family
    return read_sealed(file) if file.is_file() else None


def _finish(axes: Any, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=False)


def _draw_layers(axes: Any, epochs: Sequence[Any], layers: Sequence[dict[str, float]]) -> None:
    for i, name in enumerate(layers[0]):
        values = [100 * layer[name] for layer in layers]
        label = name.removesuffix(".weight") if len(layers[0]) <= 8 else None
        axes.plot(epochs, values, ls=LINE_STYLES[i % len(LINE_STYLES)], lw=1.4, label=label)
    _finish(axes, "Γ grows from simple to complex", "epoch", "blocks of the layer in Γ (%)")


def _draw_accuracy(axes: Any, epochs: Sequence[Any], rows: Sequence[Any]) -> None:
    for name, label, colour, style in (
        ("accuracy", "dense W", GREY, "-"),
        ("ticket_accuracy", "ticket: W on supp(Γ)", BLUE, "-"),
        ("gamma_accuracy", "Γ", ORANGE, "--"),
    ):
        values = [100 * getattr(row, name) for row in rows]
        axes.plot(epochs, values, color=colour, ls=style, lw=1.4, label=label)
    _finish(axes, "Accuracy along the path, nothing retrained", "epoch", "test accuracy (%)")


def _draw_family(axes: Any, family: dict[str, Any]) -> None:
    tickets = sorted(family["tickets"], key=lambda ticket: ticket["density"])
    densities = [100 * ticket["density"] for ticket in tickets]
    axes.axhline(100 * family["accuracy"], color=GREY, lw=1, label="dense W")
    before = [100 * ticket["before"] for ticket in tickets]
    after = [100 * ticket["after"] for ticket in tickets]
    axes.plot(densities, before, "o--", color=BLUE, lw=1.4, ms=4, label="at once")
    axes.plot(densities, after, "s-", color=GREEN, lw=1.4, ms=4, label="fine-tuned")
    axes.set_xscale("log")
    axes.set_xticks(densities, [f"{density:.2g}" for density in densities])
    axes.minorticks_off()
    _finish(axes, "One run, a family of models", "density (%)", "test accuracy (%)")
