# SPDX-License-Identifier: Apache-2.0
"""Sections: what a page says of one run, as plain values for its template."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dessilbi.files.storage import as_json
from dessilbi.reporting import wording
from dessilbi.reporting.blockfigures import entry_map, filter_sheet, norm_charts
from dessilbi.reporting.charts import Chart, EntryMap, Figure, Table
from dessilbi.reporting.comparison import growth_charts, macs_chart
from dessilbi.reporting.curves import accuracy_curves, dynamics, layers_by_epoch
from dessilbi.reporting.evidence import Evidence
from dessilbi.reporting.frames import Frame, Frames
from dessilbi.reporting.svg import to_svg

NO_MODEL = "nothing has entered yet"
FIELDS = (
    ("test accuracy of W", "dense"),
    ("... of the ticket, W on supp(Γ)", "ticket"),
    ("... of Γ", "gamma"),
    ("density of supp(Γ)", "support"),
    ("density of this model", "density"),
    ("parameters", "params"),
    ("MACs of one sample", "macs"),
    ("path time t", "time"),
)


def figures_of(found: Evidence, frames: Frames) -> dict[str, list[Figure]]:
    """Return all figures of a run, by the part of the page they stand in."""
    entry, sheet = entry_map(found), filter_sheet(found)
    growth: list[Figure] = list(growth_charts(found))
    if growth and (cost := macs_chart([found], [frames])) is not None:
        growth.append(replace(cost, name="own-training-cost"))
    return {
        "accuracy": list(accuracy_curves(found)),
        "entry": [*([entry] if entry else []), *layers_by_epoch(found)],
        "filters": [sheet] if sheet else [],
        "norms": list(norm_charts(found)),
        "growth": growth,
        "dynamics": list(dynamics(found)),
    }


def section_of(found: Evidence, frames: Frames, number: int) -> dict[str, Any]:
    """Return what a page shows of a run."""
    figures = figures_of(found, frames)
    totals = list(frames.totals.values())
    shown = [told_of(frame, frames, found) for frame in frames.frames]
    last = frames.frames[-1] if frames.frames else None
    return {
        "label": found.label,
        "lead": lead_of(found),
        "notes": [*found.notes, *_notes(frames)],
        "tiles": _tiles(found, frames),
        "frame": shown[-1] if shown else None,
        "last": len(shown) - 1,
        "fields": FIELDS,
        "layers": [_layer(name, last, total) for name, total in frames.totals.items()]
        if last
        else [],
        "explained": _explained(found, frames),
        "table": _points(shown),
        "parts": list(_parts(found, figures, number)),
        "data": {
            "totals": totals,
            "frames": [
                {
                    "shown": told,
                    "said": f"{told['where']}: density {told['density']}, ticket {told['ticket']}",
                    "alive": list(frame.alive.values()),
                    "at": {"epoch": frame.row.epoch, "density": frame.row.density or None},
                }
                for told, frame in zip(shown, frames.frames, strict=True)
            ],
        },
    }


def lead_of(found: Evidence) -> str:
    """Return a sentence on what was trained."""
    told = found.recipe
    if found.own_loop:
        steps = f", {found.rows[-1].step:,} steps" if found.rows else ""
        return f"The path of a training loop outside of dessilbi train{steps}."
    grew = ", growing" if found.growth else ""
    return (
        f"{told.get('name')}: {told.get('model')} on {told.get('data')}, {told.get('epochs')} "
        f"epochs{grew}. {told.get('summary', '')}".strip()
    )


def told_of(frame: Frame, frames: Frames, found: Evidence) -> dict[str, str]:
    """Return a position of the slider in words, by field."""
    row, dense, cost = frame.row, frames.dense, frame.cost
    nothing = not frame.commands
    unknown = NO_MODEL if nothing else "unknown"
    return {
        "where": f"epoch {wording.epoch(row.epoch)}, step {row.step:,}"
        if row.epoch is not None
        else f"step {row.step:,}",
        "dense": wording.share(row.accuracy),
        "ticket": wording.share(row.ticket_accuracy),
        "gamma": wording.share(row.gamma_accuracy),
        "support": wording.share(row.density),
        "density": NO_MODEL if nothing else wording.share(frame.density),
        "params": wording.part(cost.params, dense.params) if cost and dense else unknown,
        "macs": wording.part(cost.macs, dense.macs) if cost and dense else unknown,
        "time": wording.number(row.time),
        "command": "\n".join(frame.commands) or f"# {NO_MODEL}",
    }


def _layer(name: str, frame: Frame | None, total: int) -> dict[str, Any]:
    alive = frame.alive[name] if frame else 0
    width = f"{100 * alive / max(1, total):.4g}"
    return {"name": wording.layer(name), "count": f"{alive:,} of {total:,}", "width": width}


def _notes(frames: Frames) -> list[str]:
    told = "Parameters and MACs could not be worked out, and the layers below are not closed"
    return [f"{told}: {frames.why_not}."] if frames.why_not else []


def _explained(found: Evidence, frames: Frames) -> str:
    shown, recorded = len(frames.frames), frames.recorded
    thinned = f"{shown} of {recorded} recorded points, spread evenly. " if shown < recorded else ""
    place = str(found.run.folder)
    where = "" if place.startswith("/") else "Paste it in the folder where this page was made. "
    if found.own_loop:
        return (
            f"{thinned}Layers and density are those of the ticket that the line of Python loads: "
            f"all that had entered Γ by this step. {where}Accuracies are those that were logged."
        )
    return (
        f"{thinned}Layers, density, parameters and MACs are those of the model that the command "
        f"writes: all that had entered Γ by this step, closed, with the weights of the end of the "
        f"run. Accuracies are those measured in training at this step. {where}Data that are files "
        f"need --data or $DESSILBI_DATA as in training."
    )


def _points(shown: Sequence[Mapping[str, str]]) -> Table:
    fields = (("point", "where"), *FIELDS)
    return Table(
        [name.removeprefix("... ").split(", W")[0] for name, _ in fields],
        [[told[field] for _, field in fields] for told in shown],
    )


def _tiles(found: Evidence, frames: Frames) -> Iterable[tuple[str, str, str]]:
    if not found.own_loop:
        status = str(found.status.get("status", "unknown"))
        epochs = found.metrics[-1]["epoch"] if found.metrics else None
        yield "status", status, f"epoch {wording.epoch(epochs)}" if epochs else ""
    if found.judged:
        last = found.judged[-1]
        when = f"test, epoch {wording.epoch(last.epoch)}"
        yield "dense W", wording.share(last.accuracy), when
        yield "ticket", wording.share(last.ticket_accuracy), "W on supp(Γ), nothing retrained"
        yield "Γ", wording.share(last.gamma_accuracy), "the sparse copy by itself"
    elif "accuracy" in found.status:
        yield "accuracy", wording.share(found.status["accuracy"]), "test"
    if found.rows:
        yield "density", wording.share(found.rows[-1].density), "of the structured weights, in Γ"
    if frames.frames and (cost := frames.frames[-1].cost) and frames.dense:
        cut = wording.share(cost.params / frames.dense.params)
        yield "compacted", cut, f"of {frames.dense.params:,} parameters"


def _parts(
    found: Evidence, figures: Mapping[str, Sequence[Figure]], number: int
) -> Iterable[dict[str, Any]]:
    def part(key: str, heading: str, **more: Any) -> dict[str, Any]:
        empty: dict[str, Any] = {
            "text": "",
            "figures": [],
            "choices": [],
            "tables": [],
            "texts": [],
        }
        return empty | {"id": f"{key}-{number}", "heading": heading} | more

    drawn = {key: [_drawn(f, number) for f in some] for key, some in figures.items()}
    if drawn["accuracy"]:
        yield part("accuracy", "Accuracy", figures=drawn["accuracy"])
    if drawn["entry"]:
        yield part("entry", "What entered, and when", figures=drawn["entry"])
    if drawn["filters"] or found.path is not None:
        choices = [
            one | {"option": wording.layer(f.name.removeprefix("norms-"))}
            for one, f in zip(drawn["norms"], figures["norms"], strict=True)
        ]
        yield part(
            "filters", "Filters", figures=drawn["filters"], choices=choices, text=_no_norms(found)
        )
    if drawn["growth"]:
        yield part("growth", "Growth", figures=drawn["growth"])
    if drawn["dynamics"]:
        yield part("dynamics", "Dynamics", figures=drawn["dynamics"])
    if tables := list(_tickets(found)):
        yield part("tickets", "Tickets and retraining", tables=tables)
    if texts := list(_texts(found)):
        yield part("setup", "Configuration and environment", texts=texts)


def _no_norms(found: Evidence) -> str:
    """What is said where norms along the path are missing."""
    path = found.path
    if path is None or path.history.norms.steps:
        return ""
    if not path.history.norms.names:
        return "Nothing in this run is cut into whole filters, so there are no norms of filters."
    return (
        "The norms of filters along the path are missing: this run was made by an older release, "
        "which did not record them."
    )


def _drawn(figure: Figure, number: int) -> dict[str, Any]:
    return drawn(figure, f"r{number}")


def drawn(figure: Figure, prefix: str) -> dict[str, Any]:
    """Return a figure for the template, its picture drawn."""
    return {
        "id": f"{prefix}-{figure.name}".replace(" ", "-"),
        "title": figure.title,
        "svg": to_svg(figure, prefix),
        "note": figure.note,
        "table": figure.table,
        "wide": isinstance(figure, EntryMap) and len(figure.strips) > 24,
        "is_chart": isinstance(figure, Chart),
    }


def _tickets(found: Evidence) -> Iterable[dict[str, Any]]:
    if found.tickets:
        rows = [[t.name, wording.share(t.density), t.how] for t in found.tickets]
        yield _table("Tickets taken from this run", ["file", "density", "chosen as"], rows)
    if found.family:
        told = sorted(found.family.get("tickets", []), key=lambda t: -float(t["density"]))
        rows = [
            [*(wording.share(t.get(key)) for key in ("density", "before", "after"))] for t in told
        ]
        columns = ["density", "at once", "fine-tuned"]
        yield _table("Tickets of several densities, test accuracy", columns, rows)
    for study in found.retrained:
        rows = [
            [
                str(row["mode"]),
                wording.share(row["density"]),
                str(row["epochs"]),
                wording.share(row["before"]),
                wording.share(row["accuracy"]),
                "-" if row["std"] is None else wording.points(row["std"]),
                str(row["repetitions"]),
            ]
            for row in study.rows
        ]
        columns = ["mode", "density", "epochs", "before", "test accuracy", "deviation", "runs"]
        yield _table(f"Retrained: {study.name}", columns, rows)
    if (stop := found.status.get("settled")) and isinstance(stop, Mapping):
        saved = found.status.get("epochs_saved")
        rows = [[f"step {stop.get('step')}", wording.number(saved)]]
        yield _table("The search stopped early", ["support had settled at", "epochs saved"], rows)


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, Any]:
    return {"caption": caption, "columns": columns, "rows": rows, "note": ""}


def _texts(found: Evidence) -> Iterable[dict[str, str]]:
    if found.recipe:
        yield {"caption": "Recipe", "content": as_json(found.recipe).decode()}
    if found.environment:
        # Where data lay on that machine is nobody's business who reads the page.
        shown = {key: value for key, value in found.environment.items() if key != "data"}
        yield {"caption": "Environment", "content": as_json(shown).decode()}
    if found.status:
        yield {"caption": "Status", "content": as_json(found.status).decode()}
