# SPDX-License-Identifier: Apache-2.0
"""Commands that show what a network has learned: filters."""

from pathlib import Path as FilePath
from typing import Annotated

import typer

from dessilbi.cli.terminal import (
    DataOption,
    JsonOption,
    RunArgument,
    check_ending,
    check_new,
    console,
    data_root,
    guarded,
    print_json,
)
from dessilbi.files.runs import Run, free_path


@guarded
def filters(
    run: RunArgument,
    layer: Annotated[
        str, typer.Option(help="A convolution or linear layer: conv3.", show_default=False)
    ],
    weights: Annotated[
        bool, typer.Option("--weights", help="The kernels of the first layer themselves.")
    ] = False,
    most: Annotated[int, typer.Option(min=1, help="Images at most, those that entered first.")] = (
        256
    ),
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="Of the ascent.")] = 128,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the ascent.")] = 0,
    out: Annotated[
        FilePath | None, typer.Option(help="The image to write (.png, .svg or .pdf).")
    ] = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw what each filter of a layer answers to most, in the order in which they entered."""
    if out is not None:
        check_ending(out)
        check_new(out, "figure")
    from dessilbi.reporting.filters import filters_of
    from dessilbi.reporting.tables import filter_table

    draws = out is not None or not as_json
    if draws:
        from dessilbi.reporting.mosaic import save_mosaic
        from dessilbi.reporting.plots import check_matplotlib

        check_matplotlib()  # before anything is computed
    found = filters_of(
        *(run, layer),
        weights=weights,
        most=most,
        seed=seed,
        steps=steps,
        data_root=data_root(data),
    )
    if draws:
        name = found.layer.replace("/", "-")
        file = out or _figure_file(Run(run), f"filters-{name}{'-weights' * weights}")
        save_mosaic(found, file)
    if as_json:
        print_json({**found.to_json(), "file": str(file) if draws else None})
        return
    console().print(filter_table(found))
    if found.reads_input and not weights:
        typer.echo("This layer reads the image itself: --weights shows its kernels.")
    typer.echo(f"saved as {file}")


def _figure_file(run: Run, name: str) -> FilePath:
    run.figures.mkdir(exist_ok=True)
    return free_path(run.figures, name, ".png")
