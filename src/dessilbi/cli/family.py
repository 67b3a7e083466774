# SPDX-License-Identifier: Apache-2.0
"""Commands on the family of a run: path, ticket."""

from enum import StrEnum
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated

import typer

from dessilbi.cli.terminal import (
    DataOption,
    DensityOption,
    JsonOption,
    RunArgument,
    check_ending,
    check_new,
    console,
    data_root,
    fail,
    guarded,
    print_json,
)
from dessilbi.files.runs import Run, free_path

if TYPE_CHECKING:
    from dessilbi.blocks.ticket import Ticket
    from dessilbi.outcomes.tickets import Drawer
    from dessilbi.path.scores import Order


class OrderName(StrEnum):
    """The orders of ``Path.ticket``, as words of the command line."""

    RELATIVE = "relative"
    WEIGHT = "weight"
    DUAL = "dual"
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
    if figure is not None:
        check_ending(figure)
        check_new(figure, "figure")
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
    density: DensityOption = None,
    params: Annotated[
        float | None, typer.Option(help="Parameters at most; up to 1: a share of the dense ones.")
    ] = None,
    macs: Annotated[float | None, typer.Option(help="Likewise multiply-accumulates.")] = None,
    size: Annotated[float | None, typer.Option("--bytes", help="Likewise bytes.")] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Median latency on this machine at most.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Points of validation accuracy to lose at most.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="What had entered by this step.")] = None,
    epoch: Annotated[float | None, typer.Option(help="What had entered by this epoch.")] = None,
    early: Annotated[
        bool, typer.Option("--early", help="The support when the path had first settled.")
    ] = False,
    order: Annotated[OrderName | None, typer.Option(help="How blocks are ranked.")] = None,
    as_list: Annotated[
        bool, typer.Option("--list", help="Show the family as a table; nothing is saved.")
    ] = False,
    out: Annotated[FilePath | None, typer.Option(help="The file to write.")] = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take the member of the family that fits, ready to be compacted, as a ticket file."""
    if out is not None:
        check_new(out, "ticket")
    from dessilbi.outcomes.tickets import BUDGETS, MOMENTS, Drawer, Wish

    values = (density, params, macs, size, latency_ms, max_drop, step, epoch, early)
    asked = dict(zip((*BUDGETS, *MOMENTS), values, strict=True))
    chosen_order: Order | None = order.value if order else None
    if as_list:
        if any(value not in (None, False) for value in values) or out is not None:
            raise fail("--list shows all of the family: leave out budgets, moments and --out", 2)
        _list(Drawer(Run(run), data_root=data_root(data)), chosen_order, as_json=as_json)
        return
    try:
        wish = Wish(**asked, order=chosen_order)  # type: ignore[arg-type]
    except ValueError as error:
        raise fail(error, 2) from None
    drawn = Drawer(Run(run), data_root=data_root(data)).draw(wish)
    file = out or _ticket_file(Run(run), wish.name)
    drawn.ticket.save(file)
    if as_json:
        layers = drawn.ticket.densities()
        print_json({**drawn.to_json(), "file": str(file), "layers": layers})
    else:
        typer.echo(f"{drawn.ticket}\n{drawn}\nsaved as {file}")


def _list(drawer: "Drawer", order: "Order | None", *, as_json: bool) -> None:
    from dessilbi.reporting.tables import family_table

    members = drawer.members(order)
    if as_json:
        print_json({"members": [member.to_json() for member in members]})
    else:
        console().print(family_table(members, order or drawer.order))


def _ticket_file(run: Run, name: str) -> FilePath:
    run.tickets.mkdir(exist_ok=True)
    return free_path(run.tickets, name, ".safetensors")


def ticket_or_density(
    run: FilePath, file: FilePath | None, density: float | None, root: str | None
) -> "tuple[Ticket, str]":
    """The ticket of a file, or that of a density as `dessilbi ticket` takes it; and a name."""
    from dessilbi.blocks.ticket import Ticket
    from dessilbi.outcomes.tickets import Drawer, Wish

    if file is not None:
        return Ticket.load(file), file.stem
    wish = Wish(density=density)
    return Drawer(Run(run), data_root=root).draw(wish).ticket, wish.name
