# SPDX-License-Identifier: Apache-2.0
"""Commands that show a run to a person: report."""

from enum import StrEnum
from pathlib import Path as FilePath
from typing import Annotated

import typer

from dessilbi.cli.terminal import check_new, guarded
from dessilbi.files.runs import free_path
from dessilbi.files.storage import write_atomic

RunsArgument = Annotated[list[FilePath], typer.Argument(help="Run folders.", metavar="RUN...")]


class FigureFormat(StrEnum):
    """Formats of single figures."""

    SVG = "svg"
    PNG = "png"


@guarded
def report(
    runs: RunsArgument,
    out: Annotated[
        FilePath | None, typer.Option(help="The page to write; by default report.html.")
    ] = None,
    figures: Annotated[
        FilePath | None, typer.Option(help="Also write each figure into this folder.")
    ] = None,
    file_format: Annotated[
        FigureFormat, typer.Option("--format", help="Of the single figures.")
    ] = FigureFormat.SVG,
) -> None:
    """Write one page to look at: the path, its models, accuracies, filters; several runs beside."""
    if out is not None:
        check_new(out, "page")
    from dessilbi.reporting.page import report_of
    from dessilbi.reporting.plots import check_matplotlib, save_figures

    if figures is not None and file_format is FigureFormat.PNG:
        check_matplotlib()  # before anything is written
    made = report_of(runs)
    page = made.html().encode()
    file = out or free_path(".", "report", ".html")
    write_atomic(file, page)
    if figures is not None:
        files = save_figures(made.figures(), figures, file_format.value)
        typer.echo(f"{len(files)} figures are in {figures}")
    typer.echo(f"wrote {file} ({len(page) / 1e6:.1f} MB); open it in a browser")
