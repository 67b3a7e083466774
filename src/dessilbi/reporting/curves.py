# SPDX-License-Identifier: Apache-2.0
"""Curves: how accurate W, ticket and Gamma are along the path, and what drives them there."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dessilbi.files.storage import from_number
from dessilbi.reporting import palette, wording
from dessilbi.reporting.charts import Axis, Chart, Line, Mark, Point, Table
from dessilbi.reporting.evidence import Evidence
from dessilbi.reporting.scales import Scale, around, of_accuracy, of_density
from dessilbi.reporting.summary import Row, thinned

TABLE_ROWS = 40
NEAR = 0.01  # a ticket so close to W is told as being as good
MOST_LAYERS = 8

THREE = (
    ("dense W", "accuracy", "dense", ""),
    ("ticket", "ticket_accuracy", "ticket", ""),
    ("Γ", "gamma_accuracy", "gamma", "7 3"),
)


def accuracy_curves(found: Evidence) -> Iterable[Chart]:
    """Yield accuracy against density and against epoch, where anything was judged."""
    if not found.judged:
        return
    if any(row.density > 0 for row in found.judged):
        yield by_density(found)
    yield by_epoch(found)


def by_density(found: Evidence) -> Chart:
    """Return accuracy against the density of supp(Gamma), and judged tickets of the family."""
    rows = [row for row in found.judged if row.density > 0]
    lines = [
        Line(
            _of(rows, name, lambda row: row.density),
            *(tone, label, dash),
            dots=True,
            joined=not found.growth,  # the density of a network that grows falls when it does
        )
        for label, name, tone, dash in THREE
    ]
    tuned = _family(found)
    lines += tuned
    marks = [Mark(t.density, t.name) for t in found.tickets if t.density > 0]
    shown = [x for line in lines for x, _ in line.points] + [m.x for m in marks]
    values = [y for line in lines for _, y in line.points]
    scale = of_accuracy(values)
    return Chart(
        "accuracy-by-density",
        _density_title(rows),
        f"Test accuracy of the dense W, of the ticket (W on the support) and of Γ against the "
        f"density of the support, at {len(rows)} judged points.",
        Axis(f"density of the support (%{_logged(of_density(shown))})", of_density(shown), True),
        Axis(f"test accuracy (%){_stretched(scale)}", scale, True),
        lines,
        marks,
        _table(rows, "density"),
        _dropped(found.judged, rows),
        track="density",
    )


def by_epoch(found: Evidence) -> Chart:
    """Return accuracy against epoch, with the moments that were chosen."""
    rows = [row for row in found.judged if row.epoch is not None]
    lines = [
        Line(_of(rows, name, lambda row: row.epoch or 0.0), tone, label, dash)
        for label, name, tone, dash in THREE
    ]
    marks = [Mark(e, t.name) for t in found.tickets if (e := _when(found, t.step)) is not None]
    stop = found.status.get("settled")
    if isinstance(stop, dict) and (e := _when(found, stop.get("step"))) is not None:
        marks.append(Mark(e, "support had settled", "gamma"))
    scale = of_accuracy([y for line in lines for _, y in line.points])
    return Chart(
        "accuracy-by-epoch",
        _epoch_title(rows),
        f"Test accuracy of the dense W, of the ticket (W on the support) and of Γ by epoch, at "
        f"{len(rows)} judged points; nothing is retrained.",
        _epochs([row.epoch or 0.0 for row in rows] + [m.x for m in marks]),
        Axis(f"test accuracy (%){_stretched(scale)}", scale, True),
        lines,
        marks,
        _table(rows, "epoch"),
        track="epoch",
    )


def layers_by_epoch(found: Evidence) -> Iterable[Chart]:
    """Yield the share of each layer's blocks in Gamma, where there are few layers."""
    rows = [row for row in found.rows if row.epoch is not None]
    if len(rows) < 2 or not 0 < len(rows[-1].layers) <= MOST_LAYERS:
        return
    lines = [
        Line(
            [(row.epoch or 0.0, row.layers[name]) for row in rows],
            palette.SERIES[i % len(palette.SERIES)],
            wording.layer(name),
            palette.DASHES[i // len(palette.SERIES) % len(palette.DASHES)],
        )
        for i, name in enumerate(rows[-1].layers)
    ]
    last = rows[-1].layers
    most, least = max(last, key=lambda n: last[n]), min(last, key=lambda n: last[n])
    picked = thinned(rows, TABLE_ROWS)
    yield Chart(
        "layers",
        f"{wording.layer(most)} ends the fullest with {wording.share(last[most])} of its blocks in "
        f"Γ, {wording.layer(least)} the emptiest with {wording.share(last[least])}",
        "The share of each layer's blocks in the support of Γ by epoch.",
        _epochs([row.epoch or 0.0 for row in rows]),
        Axis("blocks of the layer in Γ (%)", Scale(0.0, 1.0), percent=True),
        lines,
        table=Table(
            ["epoch", *map(wording.layer, last)],
            [
                [wording.epoch(row.epoch), *(wording.share(v) for v in row.layers.values())]
                for row in picked
            ],
            _picked(len(picked), len(rows)),
        ),
        track="epoch",
    )


def dynamics(found: Evidence) -> Iterable[Chart]:
    """Yield the gap between W and Gamma, the path's clock, the learning rate and lambda."""
    told = [line for line in found.metrics if line.get("epoch")]
    gap = _series(told, "coupling")
    if gap:
        yield _plain(
            "gap",
            _gap_title(gap),
            "the gap ‖W − Γ‖² / 2ν",  # noqa: RUF001  # a minus and the letter nu
            gap,
            "gamma",
        )
    clock = _series(told, "time")
    if clock:
        yield _plain("clock", _clock_title(found, clock), "path time t", [(0.0, 0.0), *clock])
    rate = _series(told, "lr")
    if rate:
        first, last = wording.number(rate[0][1]), wording.number(rate[-1][1])
        stays = f"The learning rate stays at {first}"
        goes = f"The learning rate ends at {last}; its largest at the end of an epoch is "
        goes += wording.number(max(y for _, y in rate))
        yield _plain(
            "rate", stays if len({y for _, y in rate}) == 1 else goes, "learning rate", rate, "mark"
        )
    yield from _lambda(told)


def _lambda(told: Sequence[Any]) -> Iterable[Chart]:
    values = [line["lam"] for line in told if line.get("lam") is not None]
    if not values:
        return
    if isinstance(values[-1], dict):
        keys = list(values[-1])[: len(palette.SERIES)]
        series: dict[str, list[Point]] = {
            key: [
                (float(line["epoch"]), from_number(line["lam"][key]))
                for line in told
                if isinstance(line.get("lam"), dict) and key in line["lam"]
            ]
            for key in keys
        }
    else:
        series = {"": _series(told, "lam")}
    ends = ", ".join(
        f"{wording.layer(k)} {wording.number(v[-1][1])}".strip() for k, v in series.items() if v
    )
    lines = [
        Line(points, tone, wording.layer(key) if key else "", dots=len(points) < 2)
        for (key, points), tone in zip(series.items(), palette.SERIES, strict=False)
    ]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    yield Chart(
        "lambda",
        f"λ was found while the run went on; it ends at {ends}",
        "Lambda at the end of each epoch.",
        _epochs(xs),
        Axis("λ", around(ys, from_zero=True)),
        lines,
        table=Table(
            ["epoch", *(wording.layer(key) or "λ" for key in series)],
            _rows_by_epoch(list(series.values())),
        ),
    )


def _rows_by_epoch(series: Sequence[Sequence[Point]]) -> list[list[str]]:
    """The values of several curves at each epoch."""
    epochs = thinned(sorted({x for points in series for x, _ in points}), TABLE_ROWS)
    known = [dict(points) for points in series]
    return [
        [wording.epoch(x), *(wording.number(values.get(x)) for values in known)] for x in epochs
    ]


def _plain(
    name: str, title: str, label: str, points: Sequence[Point], tone: str = "ticket"
) -> Chart:
    """A single curve over epochs."""
    picked = thinned(points, TABLE_ROWS)
    return Chart(
        name,
        title,
        f"A curve of {label} by epoch: it begins with {wording.number(points[0][1])} and ends with "
        f"{wording.number(points[-1][1])}.",
        _epochs([x for x, _ in points]),
        Axis(label, around([y for _, y in points], from_zero=True)),
        [Line(points, tone, dots=len(points) < 2)],
        table=Table(
            ["epoch", label],
            [[wording.epoch(x), wording.number(y)] for x, y in picked],
            _picked(len(picked), len(points)),
        ),
        track="epoch",
    )


def _series(told: Sequence[Any], name: str) -> list[Point]:
    """The finite values of a column, by epoch."""
    found = [(float(line["epoch"]), line.get(name)) for line in told]
    numbers = [(epoch, from_number(value)) for epoch, value in found if value is not None]
    return [(epoch, value) for epoch, value in numbers if math.isfinite(value)]


def _gap_title(points: Sequence[Point]) -> str:
    first, last = points[0][1], points[-1][1]
    if first == last:
        return f"The gap between W and Γ is {wording.number(last)}"
    word = "falls" if last < first else "rises"
    return (
        f"The gap between W and Γ {word} from {wording.number(first)} after epoch "
        f"{wording.epoch(points[0][0])} to {wording.number(last)}"
    )


def _clock_title(found: Evidence, clock: Sequence[Point]) -> str:
    total = clock[-1][1]
    half = next((x for x, y in clock if y >= total / 2), clock[-1][0])
    told = f"half of the path was over by epoch {wording.epoch(half)}"
    nu = found.recipe.get("optimizer", {}).get("nu")
    kappa = found.recipe.get("optimizer", {}).get("kappa", 1.0)
    if isinstance(nu, int | float) and isinstance(kappa, int | float) and nu > 0:
        ratio = wording.number(kappa * total / nu)
        return f"The path ends at κt/ν = {ratio}; {told}"  # noqa: RUF001  # the letter nu
    return f"The path ends at t = {wording.number(total)}; {told}"


def _density_title(rows: Sequence[Row]) -> str:
    """From which density on the ticket is about as good as W was at the same time."""
    good = [row for row in rows if _gap(row) is not None]
    if not good:
        return "The tickets of this run were not judged"
    last = good[-1]
    behind = [i for i, row in enumerate(good) if (_gap(row) or 0.0) > NEAR]
    if not behind:
        return (
            f"From a density of {wording.share(good[0].density)} on, the ticket is within a point "
            f"of the dense W"
        )
    if behind[-1] == len(good) - 1:
        return (
            f"At its last density, {wording.share(last.density)}, the ticket is "
            f"{wording.points(_gap(last) or 0.0)} below the dense W"
        )
    return (
        f"From a density of {wording.share(good[behind[-1] + 1].density)} on, the ticket is within "
        f"a point of the dense W"
    )


def _gap(row: Row) -> float | None:
    if row.accuracy is None or row.ticket_accuracy is None:
        return None
    return row.accuracy - row.ticket_accuracy


def _epoch_title(rows: Sequence[Row]) -> str:
    if not rows:
        return "No judged point tells its epoch"
    last = rows[-1]
    return (
        f"After epoch {wording.epoch(last.epoch)}: W {wording.share(last.accuracy)}, "
        f"ticket {wording.share(last.ticket_accuracy)}, Γ {wording.share(last.gamma_accuracy)}"
    )


def _family(found: Evidence) -> list[Line]:
    """Tickets of one budget each, judged at once and fine-tuned."""
    tickets = (found.family or {}).get("tickets", [])
    told = sorted(tickets, key=lambda ticket: float(ticket["density"]))
    lines = []
    for key, label, tone in (("before", "by budget", "mark"), ("after", "fine-tuned", "tuned")):
        points = [(float(t["density"]), float(t[key])) for t in told if t.get(key) is not None]
        if points:
            lines.append(Line(points, tone, label, "2 3", dots=True))
    return lines


def _of(rows: Sequence[Row], name: str, x: Callable[[Row], float]) -> list[Point]:
    return [(x(row), getattr(row, name)) for row in rows if getattr(row, name) is not None]


def _when(found: Evidence, step: Any) -> float | None:
    return found.epoch_of(step) if type(step) is int else None


def _epochs(values: Sequence[float]) -> Axis:
    last = max(values, default=1.0)
    return Axis("epoch", Scale(0.0, last if last > 0 else 1.0))


def _stretched(scale: Scale) -> str:
    return ", stretched towards 100" if scale.kind == "error" else ""


def _logged(scale: Scale) -> str:
    return ", log scale" if scale.kind == "log" else ""


def _dropped(every: Sequence[Row], drawn: Sequence[Row]) -> str:
    left = len(every) - len(drawn)
    if not left:
        return ""
    points = "1 judged point" if left == 1 else f"{left} judged points"
    return f"Not on this axis: {points} at which the support was empty."


def _picked(shown: int, total: int) -> str:
    return "" if shown == total else f"{shown} of {total} rows, spread evenly."


def _table(rows: Sequence[Row], first: str) -> Table:
    picked = thinned(rows, TABLE_ROWS)
    columns = ["epoch", "step", "density", "dense W", "ticket", "Γ"]
    cells = [
        [
            wording.epoch(row.epoch),
            wording.count(row.step),
            wording.share(row.density),
            *(wording.share(getattr(row, name)) for _, name, _, _ in THREE),
        ]
        for row in picked
    ]
    if first == "density":
        columns = [columns[2], *columns[:2], *columns[3:]]
        cells = [[row[2], *row[:2], *row[3:]] for row in cells]
    return Table(columns, cells, _picked(len(picked), len(rows)))
