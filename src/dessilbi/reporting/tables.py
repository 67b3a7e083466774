# SPDX-License-Identifier: Apache-2.0
"""Tables for the terminal; they fit 80 columns."""

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table

from dessilbi.reporting.summary import Row, Summary, thinned
from dessilbi.shrinking import Shipped, Shrunk
from dessilbi.training.finetune import Outcome

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
