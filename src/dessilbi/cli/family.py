# SPDX-License-Identifier: Apache-2.0
"""Commands on the family of a run: path, ticket."""

from enum import StrEnum
from pathlib import Path as FilePath
from typing import Annotated

import typer

from dessilbi.cli.terminal import JsonOption, RunArgument, console, fail, guarded, print_json
from dessilbi.runs import Run, free_path


class OrderName(StrEnum):
    """The orders of ``Path.ticket``, as words of the command line."""

    DUAL = "dual"
    WEIGHT = "weight"
    ENTRY = "entry"


@guarded
def path(
    run: RunArgument,
    figure: Annotated[
        FilePath | None, typer.Option(help="Also draw it (.svg, .png or .pdf).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the path of a run: accuracy against density, from simple to complex."""
    from dessilbi.reporting.figures import save_path_figure
    from dessilbi.reporting.summary import summarise
    from dessilbi.reporting.tables import path_table

    summary = summarise(run)
    if figure is not None:
        save_path_figure(summary, figure)
    if as_json:
        print_json(summary.to_json())
    else:
        console().print(path_table(summary))


@guarded
def ticket(
    run: RunArgument,
    density: Annotated[float | None, typer.Option(help="Share of weights to keep.")] = None,
    step: Annotated[int | None, typer.Option(help="What had entered by this step.")] = None,
    order: Annotated[OrderName, typer.Option(help="How blocks are ranked.")] = OrderName.DUAL,
    out: Annotated[FilePath | None, typer.Option(help="The file to write.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Take one member of the family and save it as a ticket file."""
    from dessilbi.path import Path

    if (density is None) == (step is None):
        raise fail("give exactly one of --density and --step", 2)
    if density is not None and not 0 < density <= 1:
        raise fail(f"--density {density} is not allowed: it must be in (0, 1]", 2)
    if out is not None and out.exists():
        raise FileExistsError(f"{out} exists: a ticket is never overwritten; name another --out")
    chosen = Path.load(run).ticket(density=density, step=step, order=order.value)
    file = out or _ticket_file(Run(run), density, step)
    chosen.save(file)
    if as_json:
        facts = {"density": chosen.density, "file": str(file), "layers": chosen.densities()}
        print_json({**chosen.origin, **facts})
    else:
        typer.echo(f"{chosen}\nsaved as {file}")


def _ticket_file(run: Run, density: float | None, step: int | None) -> FilePath:
    run.tickets.mkdir(exist_ok=True)
    name = f"step-{step}" if density is None else f"density-{density:g}"
    return free_path(run.tickets, name, ".safetensors")
