# SPDX-License-Identifier: Apache-2.0
"""Tables for the terminal; they fit 80 columns."""

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table

from dessilbi.drawing import Drawn
from dessilbi.reporting.summary import Row, Summary, thinned
from dessilbi.shrinking import Shipped, Shrunk
from dessilbi.training.curve import CurvePoint
from dessilbi.training.finetune import Outcome
from dessilbi.training.studying import Row as RetrainedRow

MAX_LAYER_COLUMNS = 5
ROWS = 20


def percent(value: float | None) -> str:
    """Return a fraction as a percentage, or a dash for what was not measured."""
    return "-" if value is None else f"{100 * value:.1f}"


def path_table(summary: Summary) -> Group:
    """Return the path as a table: accuracy of W, ticket and Gamma against density (all in %)."""
    rows = thinned(summary.judged or summary.rows, ROWS)
    shown = f"{len(rows)} of {len(summary.rows)} points"
    table = Table(box=None, pad_edge=False)
    for column in ("epoch", "density", "W", "ticket", "Γ"):
        table.add_column(column, justify="right")
    names = list(rows[0].layers) if rows else []
    layers = names if len(names) <= MAX_LAYER_COLUMNS else []
    for name in layers:
        table.add_column(name.removesuffix(".weight"), justify="right", style="dim")
    for row in rows:
        table.add_row(*_cells(row), *(percent(row.layers[name]) for name in layers))
    return Group(
        f"{summary.recipe.get('name')}: from simple to complex ({shown}, all in %)",
        table,
        "W: dense weights; ticket: W on supp(Γ), nothing retrained; test split\n",
    )


def _cells(row: Row) -> list[str]:
    epoch = "-" if row.epoch is None else f"{row.epoch:.1f}"
    accuracies = (row.accuracy, row.ticket_accuracy, row.gamma_accuracy)
    return [epoch, percent(row.density), *map(percent, accuracies)]


def outcome_table(outcomes: Sequence[Outcome], dense: float, epochs: int) -> Group:
    """Return tickets of several densities before and after their fine-tune (all in %)."""
    table = Table(box=None, pad_edge=False)
    for column in ("density", "of all parameters", "at once", "fine-tuned"):
        table.add_column(column, justify="right")
    for o in outcomes:
        table.add_row(
            percent(o.density), percent(o.density_of_model), percent(o.before), percent(o.after)
        )
    return Group(
        "One run, a family of models (test accuracy, all in %)",
        table,
        f"fine-tune: {epochs} masked epochs; the dense W has {percent(dense)}\n",
    )


def size_table(shrunk: Shrunk, files: Shipped | None, dense: float) -> Group:
    """Return a masked net and its smaller twin side by side."""
    proof = shrunk.compacted.proof
    rows: list[tuple[str, float, float, str]] = [
        ("parameters", proof.params_before, proof.params_after, ",.0f"),
        ("MACs", proof.macs_before, proof.macs_after, ",.0f"),
    ]
    if files is not None:
        rows += [
            ("ONNX file, bytes", files.bytes_before, files.bytes_after, ",.0f"),
            ("onnxruntime, ms", files.latency_ms_before, files.latency_ms_after, ".3f"),
        ]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in ("masked", "compact", "share %"):
        table.add_column(column, justify="right")
    for name, before, after, form in rows:
        table.add_row(name, format(before, form), format(after, form), percent(after / before))
    table.add_row("accuracy", percent(shrunk.accuracy_before), percent(shrunk.accuracy_after), "")
    return Group(
        f"A ticket of density {percent(shrunk.compacted.closed.density)} %, made physically small",
        table,
        f"{shrunk.same} of {shrunk.total} predictions identical; max |difference| of logits "
        f"{proof.max_abs_diff:.2g}\n"
        f"the ticket was fine-tuned; the dense net has {percent(dense)} % accuracy\n",
    )


def family_table(members: Sequence[Drawn], order: str) -> Group:
    """Return closed tickets of several densities with what their compacted models cost."""
    table = Table(box=None, pad_edge=False)
    for column in ("density %", "parameters", "MACs", "bytes", "accuracy %"):
        table.add_column(column, justify="right")
    for member in members:
        cost = member.cost
        table.add_row(
            f"{100 * member.ticket.density:.2f}",
            *(f"{number:,}" for number in (cost.params, cost.macs, cost.bytes)),
            "-" if member.accuracy is None else f"{100 * member.accuracy:.2f}",
        )
    return Group(
        f"The family of this run, ranked by {order}",
        table,
        "numbers of the compacted model; validation accuracy, nothing retrained\n",
    )


def study_table(rows: Sequence[RetrainedRow], data: str | None) -> Group:
    """Return a retrained ticket and its controls (accuracies in %)."""
    table = Table(box=None, pad_edge=False)
    table.add_column("mode")
    for column in ("density", "params", "epochs", "before", "val", "test", "+-", "runs"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.mode,
            percent(row.density),
            f"{row.params:,}",
            str(row.epochs),
            *(_two(value) for value in (row.before, row.val_accuracy, row.accuracy, row.std)),
            str(row.repetitions),
        )
    where = "" if data is None else f" on {data}, its head afresh"
    return Group(
        f"A ticket, trained again{where} (in %)",
        table,
        "before: test accuracy before any training; +-: deviation over the runs\n",
    )


def curve_table(points: Sequence[CurvePoint], names: Sequence[str], dense: float) -> Group:
    """Return what is left of a net whose layers were pruned, by share and order (in %)."""
    orders = list(dict.fromkeys(point.order for point in points))
    table = Table(box=None, pad_edge=False)
    table.add_column("pruned", justify="right")
    for order in orders:
        table.add_column(order, justify="right")
        table.add_column("tuned", justify="right", style="dim")
    for share in dict.fromkeys(point.pruned for point in points):
        found = {point.order: point for point in points if point.pruned == share}
        cells = [(found[order].at_once, found[order].fine_tuned) for order in orders]
        table.add_row(percent(share), *(_two(value) for pair in cells for value in pair))
    return Group(
        f"{', '.join(names)} pruned by order (test accuracy in %)",
        table,
        f"tuned: after fine-tuning; the dense W has {_two(dense)}\n",
    )


def _two(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
