# SPDX-License-Identifier: Apache-2.0
"""Comparison: several runs side by side, and networks that grew beside those of a fixed width."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dessilbi.reporting import palette, wording
from dessilbi.reporting.charts import Axis, Chart, Line, Point, Table
from dessilbi.reporting.evidence import Evidence
from dessilbi.reporting.frames import Frames
from dessilbi.reporting.scales import Scale, around, of_accuracy, of_density
from dessilbi.reporting.summary import thinned
from dessilbi.training.growing import TRAINING

ROWS = 40
RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def side_by_side(runs: Sequence[Evidence]) -> Iterable[Chart]:
    """Yield the tickets' accuracies of several runs against density and against epoch."""
    judged = [run for run in runs if run.judged]
    if len(judged) < 2:
        return
    for quantity in ("density", "epoch"):
        lines = []
        for i, run in enumerate(judged):
            points = [
                (float(getattr(row, quantity)), row.ticket_accuracy)
                for row in run.judged
                if row.ticket_accuracy is not None and getattr(row, quantity)
            ]
            # The density of a network that grows falls when it does: a line would go astray.
            line = Line(points, _tone(i), run.label, _dash(i), dots=quantity == "density")
            lines.append(replace(line, joined=quantity == "epoch" or not run.growth))
        lines = [line for line in lines if line.points]
        if lines:
            yield _side_by_side(quantity, lines, alike=len({_data(run) for run in judged}) == 1)


def _data(run: Evidence) -> str:
    return str(run.recipe.get("data", "unknown"))


def _side_by_side(quantity: str, lines: Sequence[Line], *, alike: bool) -> Chart:
    xs = [x for line in lines for x, _ in line.points]
    scale = of_accuracy([y for line in lines for _, y in line.points])
    by_density = quantity == "density"
    best = max(lines, key=lambda line: line.points[-1][1])
    x, y = best.points[-1]
    where = f"a density of {wording.share(x)}" if by_density else f"epoch {wording.epoch(x)}"
    across = of_density(xs) if by_density else Scale(0.0, max(xs))
    log = ", log scale" if across.kind == "log" else ""
    title = f"The best last ticket is that of {best.label}: {wording.share(y)} at {where}"
    return Chart(
        f"runs-by-{quantity}",
        title if alike else f"The tickets of {len(lines)} runs, on data that differ",
        f"Test accuracy of the tickets of {len(lines)} runs against {quantity}.",
        Axis(f"density of the support (%{log})", across, True)
        if by_density
        else Axis("epoch", across),
        Axis("test accuracy of the ticket (%)", scale, percent=True),
        lines,
        table=Table(
            ["run", quantity, "ticket"],
            [
                [line.label, wording.share(x) if by_density else wording.epoch(x), wording.share(y)]
                for line in lines
                for x, y in thinned(line.points, max(2, ROWS // len(lines)))
            ],
        ),
    )


def _tone(number: int) -> str:
    return palette.SERIES[number % len(palette.SERIES)]


def _dash(number: int) -> str:
    return palette.DASHES[number % len(palette.DASHES)]


def growth_charts(found: Evidence) -> Iterable[Chart]:
    """Yield the width of each layer over epochs, of a run that grew."""
    told = [line for line in found.growth if isinstance(line.get("sizes"), Mapping)]
    if not told:
        return
    names = list(told[-1]["sizes"])
    end = max([float(line["epoch"]) for line in [*found.metrics, *told]])
    lines = []
    for i, name in enumerate(names):
        points = [(float(t["epoch"]), float(t["sizes"][name])) for t in told if name in t["sizes"]]
        points.append((end, points[-1][1]))
        lines.append(Line(points, _tone(i), name if len(names) <= 8 else "", _dash(i), steps=True))
    first, last = (sum(t["sizes"].values()) for t in (told[0], told[-1]))
    shown = names[:8]
    yield Chart(
        "widths",
        f"The network went from {first:,} to {last:,} units in {len(names)} layers, and from "
        f"{told[0]['params']:,} to {told[-1]['params']:,} parameters",
        f"The width of each of {len(names)} layers by epoch.",
        Axis("epoch", Scale(0.0, end or 1.0)),
        Axis(
            "width of the layer", around([y for ln in lines for _, y in ln.points], from_zero=True)
        ),
        lines,
        table=Table(
            ["epoch", *shown, "parameters", "MACs"],
            [
                [
                    wording.epoch(float(line["epoch"])),
                    *(str(line["sizes"].get(name, "-")) for name in shown),
                    wording.count(line["params"]),
                    wording.count(line["macs"]),
                ]
                for line in thinned(told, ROWS)
            ],
        ),
        note="" if len(names) <= 8 else f"The table has the first 8 of {len(names)} layers.",
        track="epoch",
    )


def macs_chart(runs: Sequence[Evidence], frames: Sequence[Frames]) -> Chart | None:
    """Return training cost against accuracy, where a run grew: with the fixed widths beside it."""
    if not any(run.growth for run in runs):
        return None
    lines = []
    grown = {_data(run) for run in runs if run.growth}
    for i, (run, own) in enumerate(zip(runs, frames, strict=True)):
        points = _spent(run, own) if _data(run) in grown else []
        kind = "grew" if run.growth else "fixed width"
        if points:
            lines.append(Line(points, _tone(i), f"{run.label} ({kind})", _dash(i)))
    if not lines:
        return None
    scale = of_accuracy([y for line in lines for _, y in line.points])
    ends = [(line.label, *line.points[-1]) for line in lines]
    power = 3 * int(math.log10(max(1.0, *(x for _, x, _ in ends))) // 3)
    title = "; ".join(f"{label}: {wording.share(y)} for {_macs(x)} MACs" for label, x, y in ends)
    return Chart(
        "training-cost",
        title,
        f"Validation accuracy of the dense W against the multiply-accumulates of the training so "
        f"far, all sizes counted, of {len(lines)} runs; a step counts {TRAINING} forward passes.",
        Axis(
            f"MACs of the training (10{str(power).translate(RAISED)})",
            around([x / 10**power for _, x, _ in ends], from_zero=True),
        ),
        Axis("validation accuracy of W (%)", scale, percent=True),
        [
            Line([(x / 10**power, y) for x, y in ln.points], ln.tone, ln.label, ln.dash)
            for ln in lines
        ],
        table=Table(
            ["run", "MACs of the training", "validation accuracy"],
            [
                [line.label, wording.count(round(x)), wording.share(y)]
                for line in lines
                for x, y in thinned(line.points, max(2, ROWS // len(lines)))
            ],
        ),
    )


def _macs(value: float) -> str:
    return f"{value:.3g}".replace("e+0", "e").replace("e+", "e")


def _spent(run: Evidence, own: Frames) -> list[Point]:
    """(MACs of the training up to an epoch, validation accuracy at its end)."""
    batch = run.recipe.get("batch_size")
    told = [line for line in run.metrics if line.get("val_accuracy") is not None]
    if not isinstance(batch, int) or not told:
        return []
    if not run.growth:
        if own.dense is None:
            return []
        cost = TRAINING * own.dense.macs * batch
        return [(float(cost * line["step"]), float(line["val_accuracy"])) for line in told]
    sizes = list(run.growth)
    return [
        (_spent_by(sizes, int(line["step"]), batch), float(line["val_accuracy"])) for line in told
    ]


def _spent_by(sizes: Sequence[Mapping[str, Any]], step: int, batch: int) -> float:
    since = [line for line in sizes if line["step"] < step] or sizes[:1]
    here = since[-1]
    return float(here["training_macs"] + TRAINING * here["macs"] * batch * (step - here["step"]))
