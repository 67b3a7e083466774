# SPDX-License-Identifier: Apache-2.0
"""Tables for the terminal; they fit 80 columns, whatever layers and runs are called."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from dessilbi.columns import WIDTH, paragraph, short_names, sparkline
from dessilbi.compaction.proving import Proof
from dessilbi.outcomes.compacting import Shipped, Shrunk
from dessilbi.outcomes.tickets import Drawn
from dessilbi.reporting.filters import Filters
from dessilbi.reporting.summary import Row, Summary, thinned
from dessilbi.training.curve import CurvePoint
from dessilbi.training.finetune import Outcome
from dessilbi.training.studying import Row as RetrainedRow

ROWS = 20
LAYERS = 20  # whose curves are shown
NAME, CURVE = 24, 40  # columns of a name beside a curve, and of a curve


def percent(value: float | None) -> str:
    """Return a fraction as a percentage, or a dash for what was not measured."""
    return "-" if value is None else f"{100 * value:.1f}"


def path_table(summary: Summary) -> Group:
    """Return the path as a table: accuracy of W, ticket and Gamma against density (all in %)."""
    rows = thinned(summary.judged or summary.rows, ROWS)
    shown = f"{len(rows)} of {len(summary.rows)} points"
    columns = ("epoch", "density", "W", "ticket", "Γ")
    layers = _layer_columns(rows)
    table = _table(*columns)
    for name in layers.values():
        table.add_column(name, justify="right", style="dim", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row), *(percent(row.layers[name]) for name in layers))
    return Group(
        paragraph(f"{summary.recipe.get('name')}: from simple to complex ({shown}, all in %)"),
        table,
        "W: dense weights; ticket: W on supp(Γ), nothing retrained; test split\n",
        *_curves(summary),
    )


def _table(*numbers: str, words: Sequence[str] = ()) -> Table:
    """A table with columns of words, and of numbers after them."""
    table = Table(box=None, pad_edge=False)
    for column in words:
        table.add_column(column, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _layer_columns(rows: Sequence[Row]) -> dict[str, str]:
    """The layers that have a column of their own, where all of them have the room; what to say."""
    names = _layers_of(rows)
    left = WIDTH - len("epoch  density  100.0  ticket  100.0")
    return names if sum(2 + max(5, len(name)) for name in names.values()) <= left else {}


def _layers_of(rows: Sequence[Row]) -> dict[str, str]:
    """The tensors of a run and their short names."""
    names = list(rows[0].layers) if rows else []
    short = short_names([name.removesuffix(".weight") for name in names], NAME)
    return dict(zip(names, short, strict=True))


def _curves(summary: Summary) -> Iterator[Any]:
    """How accuracies and densities went over the recorded points, a line for each."""
    rows = summary.rows
    if len(rows) < 2:
        return
    curves: dict[str, Sequence[float | None]] = {
        "accuracy of W": _held([row.accuracy for row in rows]),
        "accuracy of the ticket": _held([row.ticket_accuracy for row in rows]),
        "accuracy of Γ": _held([row.gamma_accuracy for row in rows]),
        "density of Γ": [row.density for row in rows],
    }
    layers = _layers_of(rows)
    for name in list(layers)[:LAYERS]:
        curves[layers[name]] = [row.layers[name] for row in rows]
    table = _table("first", "last", words=("", "over all points"))
    for name, values in curves.items():
        known = [value for value in values if value is not None]
        if known:
            table.add_row(name, sparkline(values, CURVE), *map(percent, (known[0], known[-1])))
    yield table
    if len(layers) > LAYERS:
        yield f"... and {len(layers) - LAYERS} more layers; --json has them all"
    yield "each curve from its own lowest to its highest value; first and last in %;"
    yield "an accuracy stands until the next point that was judged\n"


def _held(values: Sequence[float | None]) -> list[float | None]:
    """Each value until the next that is known."""
    held: list[float | None] = []
    for value in values:
        held.append(held[-1] if value is None and held else value)
    return held


def _cells(row: Row) -> list[str]:
    epoch = "-" if row.epoch is None else f"{row.epoch:.1f}"
    accuracies = (row.accuracy, row.ticket_accuracy, row.gamma_accuracy)
    return [epoch, percent(row.density), *map(percent, accuracies)]


def outcome_table(outcomes: Sequence[Outcome], dense: float, epochs: int) -> Group:
    """Return tickets of several densities before and after their fine-tune (all in %)."""
    table = _table("density", "of all parameters", "at once", "fine-tuned")
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
    table = _table("masked", "compact", "share %", words=("",))
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


def proof_text(proof: Proof) -> str:
    """Return what a compaction did, in numbers and, below, in words."""
    return "\n".join(paragraph(line, indent=2) for line in str(proof).splitlines())


def family_table(members: Sequence[Drawn], order: str) -> Group:
    """Return closed tickets of several densities with what their compacted models cost."""
    table = _table("density %", "parameters", "MACs", "bytes", "accuracy %")
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
    columns = ("density", "params", "epochs", "before", "val", "test", "+-", "runs")
    table = _table(*columns, words=("mode",))
    for row in rows:
        table.add_row(
            row.mode,
            percent(row.density),
            _count(row.params),
            str(row.epochs),
            *(_two(value) for value in (row.before, row.val_accuracy, row.accuracy, row.std)),
            str(row.repetitions),
        )
    where = "" if data is None else f" on {data}, its head afresh"
    return Group(
        paragraph(f"A ticket, trained again{where} (in %)"),
        table,
        "before: test accuracy before any training; +-: deviation over the runs\n",
    )


def curve_table(points: Sequence[CurvePoint], names: Sequence[str], dense: float) -> Group:
    """Return what is left of a net whose layers were pruned, by share and order (in %)."""
    orders = list(dict.fromkeys(point.order for point in points))
    table = _table("pruned")
    for order in orders:
        table.add_column(order, justify="right")
        table.add_column("tuned", justify="right", style="dim")
    for share in dict.fromkeys(point.pruned for point in points):
        found = {point.order: point for point in points if point.pruned == share}
        cells = [(found[order].at_once, found[order].fine_tuned) for order in orders]
        table.add_row(percent(share), *(_two(value) for pair in cells for value in pair))
    return Group(
        paragraph(f"{', '.join(names)} pruned by order (test accuracy in %)"),
        table,
        f"tuned: after fine-tuning; the dense W has {_two(dense)}\n",
    )


def growth_table(rounds: Sequence[Mapping[str, Any]]) -> Group:
    """Return the sizes that a network had while it grew, and the widths of its layers."""
    table = _table("after epoch", "parameters", "MACs", "accuracy %")
    for line in rounds:
        counts = (f"{line[name]:,}" for name in ("params", "macs"))
        table.add_row(str(line["epoch"]), *counts, _two(line["accuracy"]))
    names = list(dict.fromkeys(name for line in rounds for name in line["sizes"]))
    short = short_names(names, NAME)
    room = max(map(len, short), default=0) + 2
    widths = [
        paragraph(
            " ".join(str(line["sizes"].get(name, "-")) for line in rounds),
            label.ljust(room),
        )
        for name, label in zip(names, short, strict=True)
    ]
    return Group(
        "A network that grew (validation accuracy)",
        table,
        "\nwidths, from its start to its end",
        *widths,
        f"\ntraining took {rounds[-1]['training_macs']:,} MACs in all",
    )


def filter_table(found: Filters) -> Group:
    """Return the filters of a layer that entered first, and how much each answers to its image."""
    by = "step" if any(each.epoch is None for each in found.entered) else "epoch"
    answers_of = ("on noise", "on its image") if found.kind == "maximised" else ()
    table = _table("filter", by, *answers_of)
    shown = found.entered[:ROWS]
    for each in shown:
        moment = str(each.step) if each.epoch is None else f"{each.epoch:.1f}"
        answers = () if each.after is None else (f"{each.before:.3g}", f"{each.after:.3g}")
        table.add_row(str(each.index), moment, *answers)
    title = f"{found.layer} of {found.recipe}: {found.total_entered} of {found.total} entered Γ"
    more = found.total_entered - len(shown)
    return Group(
        paragraph(title + (", the first:" if more else "")),
        *([table] if shown else []),
        *([f"... and {more} more; --json has them all"] if more else []),
    )


def _count(number: int) -> str:
    """A number in at most 11 columns."""
    return f"{number:,}" if number < 10**9 else f"{number / 1e6:,.0f} M"


def _two(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
