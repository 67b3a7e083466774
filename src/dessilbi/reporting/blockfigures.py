# SPDX-License-Identifier: Apache-2.0
"""Figures of blocks: when each entered, how the norms of filters went, what the first ones see."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path as FilePath

import torch
from torch import Tensor

from dessilbi.blocks.structure import block_norms, expand
from dessilbi.files.sealing import check_sealed
from dessilbi.files.tensorfiles import load_tensors
from dessilbi.path.history import NEVER
from dessilbi.path.path import Path
from dessilbi.reporting import palette, wording
from dessilbi.reporting.charts import (
    Axis,
    Chart,
    EntryMap,
    FilterSheet,
    Line,
    Strip,
    Table,
    Tile,
)
from dessilbi.reporting.evidence import Evidence
from dessilbi.reporting.pixels import Pixel
from dessilbi.reporting.scales import Scale, around
from dessilbi.reporting.summary import thinned

CELLS = 240  # of a row of the entry map
POINTS = 60  # of a curve of norms
MOST_TILES = 72
MOST_LINES = 512  # of one layer


def entry_map(found: Evidence) -> EntryMap | None:
    """Return when the blocks of every layer entered, or None where nothing was recorded."""
    path = found.path
    if path is None or not found.rows:
        return None
    entries = {name: entry.flatten() for name, entry in path.entry().items()}
    end = max(1, found.rows[-1].step)
    strips = [Strip(wording.layer(n), _cells(e, end)) for n, e in entries.items() if e.numel()]
    everything = torch.cat(list(entries.values()))
    came = everything[everything != NEVER]
    total = len(everything)
    biggest = max(entry.numel() for entry in entries.values())
    note = (
        f"Each row is a layer, its blocks in order of entry; layers with more than {CELLS} blocks "
        f"are drawn with {CELLS} cells, evenly picked."
        if biggest > CELLS
        else "Each row is a layer, its blocks in order of entry."
    )
    return EntryMap(
        "first-entry",
        _entry_title(found, came, total),
        f"For each of {len(strips)} layers, when its blocks were first seen in Γ.",
        strips,
        f"epoch {wording.epoch(0.0)}" if found.steps_per_epoch else "step 0",
        _moment(found, end),
        Table(
            ["layer", "blocks", "entered", "first", "median", "last"],
            [_entry_row(found, name, entry) for name, entry in entries.items()],
        ),
        note,
    )


def _cells(entry: Tensor, end: int) -> list[float | None]:
    never = torch.iinfo(torch.int64).max
    order = entry.masked_fill(entry == NEVER, never).sort().values
    if len(order) > CELLS:
        order = order[(torch.arange(CELLS) + 0.5).mul(len(order) / CELLS).long()]
    return [None if step == never else step / end for step in order.tolist()]


def _entry_title(found: Evidence, came: Tensor, total: int) -> str:
    if not len(came):
        return f"None of the {total:,} blocks has entered Γ"
    median = int(came.sort().values[(len(came) - 1) // 2])
    return (
        f"{wording.share(len(came) / total)} of the {total:,} blocks entered Γ, half of these by "
        f"{_moment(found, median)}"
    )


def _moment(found: Evidence, step: int) -> str:
    epoch = found.epoch_of(step)
    return f"step {step:,}" if epoch is None else f"epoch {wording.epoch(epoch)}"


def _entry_row(found: Evidence, name: str, entry: Tensor) -> list[str]:
    came = entry[entry != NEVER].sort().values
    moments = [came[0], came[(len(came) - 1) // 2], came[-1]] if len(came) else []
    told = [_moment(found, int(step)) for step in moments] or ["never"] * 3
    return [wording.layer(name), wording.count(entry.numel()), wording.count(len(came)), *told]


def norm_charts(found: Evidence) -> Iterable[Chart]:
    """Yield ||W_g|| over epochs for every layer whose norms were recorded.

    Filters that are in the support at the end are drawn apart from those that are not.
    """
    path = found.path
    if path is None or not path.history.norms.steps or found.steps_per_epoch is None:
        return
    norms, specs = path.history.norms, path.specs
    steps = thinned(norms.steps, POINTS)
    recorded = [norms.at(step, specs) for step in steps]
    first = _first_norms(found, path)
    support = path.support(step=path.step)
    for name in norms.names:
        if not specs[name].num_blocks:
            continue
        rows = [recorded_at[name].flatten() for recorded_at in recorded]
        epochs = [found.epoch_of(step) or 0.0 for step in steps]
        if name in first:
            rows, epochs = [first[name], *rows], [0.0, *epochs]
        values = torch.stack(rows).T
        note = f"{len(steps)} of {len(norms.steps)} recorded points are drawn. "
        note = note if len(steps) < len(norms.steps) else ""
        yield _norm_chart(name, epochs, values, support[name].flatten(), note)


def _norm_chart(
    name: str, epochs: Sequence[float], values: Tensor, selected: Tensor, note: str
) -> Chart:
    count = len(values)
    drawn = sorted(set(thinned(range(count), MOST_LINES)))
    if len(drawn) < count:
        note += f"{len(drawn)} of {count} filters are drawn. "
    lines = []
    for alive, tone in ((False, "gamma"), (True, "ticket")):
        for i in (i for i in drawn if bool(selected[i]) == alive):
            points = list(zip(epochs, values[i].tolist(), strict=True))
            lines.append(Line(points, tone, thin=True, dash="" if alive else "4 2"))
    lines += [Line((), "ticket", "selected"), Line((), "gamma", "not selected", "4 2")]
    layer = wording.layer(name)
    finite = [v for v in values.flatten().tolist() if math.isfinite(v)]
    last = values[:, -1]
    return Chart(
        f"norms-{layer}",
        _norm_title(layer, last[selected], last[~selected]),
        f"The norm of each of the {count} filters of {layer} by epoch; {int(selected.sum())} are "
        f"in the support at the end, {int((~selected).sum())} are not.",
        Axis("epoch", Scale(0.0, max(epochs) or 1.0)),
        Axis("‖W_g‖ of each filter", around(finite, from_zero=True)),
        lines,
        table=_norm_table(last, selected),
        note=note.strip(),
        track="epoch",
    )


def _norm_table(last: Tensor, selected: Tensor) -> Table:
    """The norms at the end: smallest, median and largest of both kinds."""
    rows = []
    for word, values in (("selected", last[selected]), ("not selected", last[~selected])):
        if len(values):
            some = [values.min(), values.median(), values.max()]
            rows.append([word, str(len(values)), *(wording.number(float(v)) for v in some)])
    return Table(["at the end", "filters", "smallest norm", "median", "largest"], rows)


def _norm_title(layer: str, selected: Tensor, others: Tensor) -> str:
    if not len(others):
        return f"{layer}: all {len(selected)} filters are selected"
    if not len(selected):
        return f"{layer}: none of the {len(others)} filters is selected"
    if float(selected.min()) > float(others.max()):
        larger = "filter ends" if len(selected) == 1 else f"{len(selected)} filters all end"
        rest = "the other one" if len(others) == 1 else f"the {len(others)} others"
        return f"{layer}: the selected {larger} with a larger norm than {rest}"
    return (
        f"{layer}: the selected filters ({len(selected)}) end with a median norm of "
        f"{wording.number(float(selected.median()))}, the others ({len(others)}) with "
        f"{wording.number(float(others.median()))}"
    )


def _first_norms(found: Evidence, path: Path) -> Mapping[str, Tensor]:
    """Norms at the start, where the first weights have the shapes of the last."""
    tensors = _tensors(found.run.init)
    return {
        name: block_norms(tensors[name].float(), spec.block).flatten()
        for name, spec in path.specs.items()
        if name in tensors and tuple(tensors[name].shape) == spec.shape
    }


def _tensors(file: FilePath) -> dict[str, Tensor]:
    if not file.is_file():
        return {}
    check_sealed(file)
    return load_tensors(file)


def filter_sheet(found: Evidence) -> FilterSheet | None:
    """Return the filters of the first convolution over one or three channels as images."""
    path = found.path
    if path is None or not found.rows:
        return None
    weights = _tensors(found.run.model)
    name = next(
        (n for n, s in path.specs.items() if len(s.shape) == 4 and s.shape[1] in (1, 3)), ""
    )
    if name not in weights or tuple(weights[name].shape) != path.specs[name].shape:
        return None
    alive = path.support(step=path.step).mask_of(name).flatten(1).any(1)
    entry = _entry_by_filter(path, name)
    order = sorted(range(len(alive)), key=lambda i: (not alive[i], entry[i] < 0, entry[i], i))
    shown = order[:MOST_TILES]
    largest = float(weights[name].abs().max()) or 1.0
    tiles = [
        Tile(
            _pixels(weights[name][i] / largest),
            bool(alive[i]),
            f"{i}" if entry[i] < 0 else f"{i}: {_moment(found, entry[i]).replace('epoch ', 'e')}",
        )
        for i in shown
    ]
    layer, living, total = wording.layer(name), int(alive.sum()), len(alive)
    colours = (
        "orange is negative, blue positive, and what is faint is near zero"
        if weights[name].shape[1] == 1
        else ("red, green and blue are the three channels, grey is zero")
    )
    left = f" The first {len(shown)} of {total} are shown." if len(shown) < total else ""
    return FilterSheet(
        "first-filters",
        f"{layer}: {living} of {total} filters are alive at the end",
        f"The {total} filters of {layer} as images of their final weights, sorted by first entry.",
        tiles,
        Table(
            ["filter", "state", "first entry", "norm"],
            [
                [
                    str(i),
                    "alive" if alive[i] else "dead",
                    "never" if entry[i] < 0 else _moment(found, entry[i]),
                    wording.number(float(weights[name][i].norm())),
                ]
                for i in order
            ],
        ),
        f"Final weights W, all on one scale of ±{wording.number(largest)}: {colours}. Under each "
        f"its number and first entry (e: epoch).{left}",
    )


def _entry_by_filter(path: Path, name: str) -> list[int]:
    """The first entry of anything of each filter; -1: never."""
    spec, never = path.specs[name], torch.iinfo(torch.int64).max
    entry = path.entry()[name]
    first = expand(entry.masked_fill(entry == NEVER, never), spec.block, spec.shape).flatten(1)
    return [-1 if step == never else step for step in first.amin(1).tolist()]


def _pixels(weights: Tensor) -> list[list[Pixel]]:
    """A filter in [-1, 1] as colours, one row after the other; the nearer to 0, the fainter."""
    if weights.shape[0] == 3:
        channels = ((weights + 1) * 127.5).round().int().permute(1, 2, 0).tolist()
        return [[(red, green, blue, 255) for red, green, blue in row] for row in channels]
    negative, positive = palette.rgb(palette.NEGATIVE), palette.rgb(palette.POSITIVE)
    return [
        [(*(positive if value > 0 else negative), round(255 * abs(value))) for value in row]
        for row in weights[0].tolist()
    ]
