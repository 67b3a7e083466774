# SPDX-License-Identifier: Apache-2.0
"""SVG: a figure becomes a small picture whose colours are those of the page it stands in.

Everything that comes from a run is escaped. Nothing has a style attribute, which a strict page
would refuse; colours come by class, from the sheet of the page or, alone, from one inside.
"""

import math
from collections.abc import Iterable
from textwrap import wrap

from markupsafe import Markup

from dessilbi.reporting import palette
from dessilbi.reporting.charts import Axis, Chart, EntryMap, Figure, FilterSheet, Line
from dessilbi.reporting.pixels import data_url

WIDTH, HEIGHT = 480, 280  # without legend and title
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 26, 46
ROW = 17  # of a legend
LETTER = 6.9  # the mean width of a letter at 11 px, for what has to be placed beside text
TITLE_HEIGHT = 20


def to_svg(figure: Figure, prefix: str, *, alone: bool = False) -> Markup:
    """Return a figure as an ``svg`` element.

    Args:
        figure: What to draw.
        prefix: Begins every id in it; a page gives each figure another.
        alone: With its title and its own colours (the light ones), to be a file by itself.
    """
    if isinstance(figure, Chart):
        height, body = _chart(figure, prefix)
    elif isinstance(figure, EntryMap):
        height, body = _entry_map(figure)
    else:
        height, body = _sheet(figure)
    ids = f"{prefix}-{figure.name}"
    head, above, attributes = Markup(), 0, Markup()
    if alone:
        lines = wrap(figure.title, 62)
        above = TITLE_HEIGHT * len(lines) + 10
        head = Markup("<style>{}</style>").format(_colours())
        head += _rect(0, 0, WIDTH, height + above, "ground")
        head += Markup("").join(
            _text(12, TITLE_HEIGHT * (n + 1), line, "title") for n, line in enumerate(lines)
        )
        attributes = Markup('xmlns="http://www.w3.org/2000/svg" width="{}" height="{}"').format(
            2 * WIDTH, 2 * (height + above)
        )
        body = Markup('<g transform="translate(0 {})">{}</g>').format(above, body)
    return Markup(
        '<svg {} viewBox="0 0 {} {}" role="img" aria-labelledby="{}-t {}-d" class="figure">'
        '<title id="{}-t">{}</title><desc id="{}-d">{}</desc>{}{}</svg>'
    ).format(
        *(attributes, WIDTH, height + above, ids, ids, ids, figure.title, ids, figure.told),
        *(head, body),
    )


def _colours() -> Markup:
    rules = [f".t-{name}{{stroke:{t.light};color:{t.light}}}" for name, t in palette.TONES.items()]
    rules += [f".f-{name}{{fill:{t.light}}}" for name, t in palette.TONES.items()]
    return Markup("".join(rules) + SHAPES)  # noqa: S704  # nothing in it comes from a run


SHAPES = (
    "svg text{font:11px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}"
    ".curve{fill:none;stroke-width:1.9;stroke-linejoin:round;stroke-linecap:round}"
    ".curve.thin{stroke-width:.9;stroke-opacity:.75}.grid{stroke-width:1}"
    ".mark{stroke-width:1.2;stroke-dasharray:3 3}.dot{stroke-width:1.2}"
    "svg text.tag{stroke-width:4px;stroke-linejoin:round;paint-order:stroke}"
    "svg text.title{font-size:13px;font-weight:600}image{image-rendering:pixelated}"
    ".frame{fill:none;stroke-width:1.6}.frame.dead{stroke-dasharray:2.5 2.5;stroke-width:1.2}"
)


def _num(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> Markup:
    tone = "soft" if kind in ("tick", "axis") else "ink"
    return Markup('<text x="{}" y="{}" text-anchor="{}" class="{} f-{}">{}</text>').format(
        _num(x), _num(y), anchor, kind, tone, text
    )


def _line(x1: float, y1: float, x2: float, y2: float, classes: str) -> Markup:
    places = [_num(v) for v in (x1, y1, x2, y2)]
    return Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>').format(*places, classes)


def _rect(x: float, y: float, width: float, height: float, tone: str) -> Markup:
    places = [_num(v) for v in (x, y, width, height)]
    return Markup('<rect x="{}" y="{}" width="{}" height="{}" class="f-{}"/>').format(*places, tone)


def _across(axis: Axis, x: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * axis.scale.place(x)


def _up(axis: Axis, y: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * axis.scale.place(y)


def _chart(chart: Chart, prefix: str) -> tuple[int, Markup]:
    above, legend = _legend(chart)
    parts = list(_axes(chart))
    parts += [_curve(line, chart) for line in chart.lines if line.points]
    parts += _marks(chart)
    if chart.track:
        parts.append(_pointer(chart, prefix))
    inside = Markup('<g transform="translate(0 {})">{}</g>').format(above, Markup("").join(parts))
    return HEIGHT + above, Markup("").join(legend) + inside


def _tick(value: float, axis: Axis) -> str:
    if axis.percent:
        return f"{100 * value:.6g}"
    return f"{value:,.0f}" if axis.whole or abs(value) >= 1000 else f"{value:.6g}"


def _axes(chart: Chart) -> Iterable[Markup]:
    x, y = chart.x, chart.y
    base = HEIGHT - BOTTOM
    for value in y.scale.ticks(5):
        place = _up(y, value)
        yield _line(LEFT, place, WIDTH - RIGHT, place, "grid t-line")
        yield _text(LEFT - 8, place + 4, _tick(value, y), "tick", "end")
    for value in x.scale.ticks(6):
        place = _across(x, value)
        yield _line(place, base, place, base + 4, "grid t-soft")
        yield _text(place, base + 17, _tick(value, x), "tick", "middle")
    yield _line(LEFT, base, WIDTH - RIGHT, base, "grid t-soft")
    yield _text(WIDTH - RIGHT, base + 37, x.label, "axis", "end")
    yield _text(8, 14, y.label, "axis")


def _legend(chart: Chart) -> tuple[int, list[Markup]]:
    """The legend in as many rows as it needs, and its height."""
    labelled = [line for line in chart.lines if line.label]
    parts: list[Markup] = []
    x, row = 8.0, 0
    for line in labelled:
        label = line.label if len(line.label) <= 34 else line.label[:32] + "..."
        length = 34 + LETTER * len(label)
        if x > 8 and x + length > WIDTH:
            x, row = 8.0, row + 1
        y = 14.0 + ROW * row
        if line.joined:
            parts.append(
                Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="curve t-{}"{}/>').format(
                    _num(x), _num(y - 4), _num(x + 18), _num(y - 4), line.tone, _dashed(line)
                )
            )
        if line.dots:
            parts.append(_dot(x + 9, y - 4, line.tone))
        parts.append(_text(x + 23, y, label))
        x += length
    return (ROW * (row + 1) + 8 if labelled else 0), parts


def _dashed(line: Line) -> Markup:
    return Markup(' stroke-dasharray="{}"').format(line.dash) if line.dash else Markup()


def _dot(x: float, y: float, tone: str) -> Markup:
    return Markup('<circle cx="{}" cy="{}" r="3" class="dot f-{} t-ground"/>').format(
        _num(x), _num(y), tone
    )


def _curve(line: Line, chart: Chart) -> Markup:
    found = [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]
    places = [(_across(chart.x, x), _up(chart.y, y)) for x, y in found]
    if not places:
        return Markup()
    drawn = Markup()
    if line.joined and len(places) > 1:
        way = [f"M{_num(places[0][0])} {_num(places[0][1])}"]
        for x, y in places[1:]:
            way.append(f"H{_num(x)}V{_num(y)}" if line.steps else f"L{_num(x)} {_num(y)}")
        thin = " thin" if line.thin else ""
        drawn = Markup('<path d="{}" class="curve{} t-{}"{}/>').format(
            "".join(way), thin, line.tone, _dashed(line)
        )
    if line.dots or len(places) == 1:
        drawn += Markup("").join(_dot(x, y, line.tone) for x, y in places)
    return drawn


def _marks(chart: Chart) -> Iterable[Markup]:
    taken: list[float] = []
    for mark in sorted(chart.marks, key=lambda mark: mark.x):
        x = _across(chart.x, mark.x)
        yield _line(x, TOP, x, HEIGHT - BOTTOM, f"mark t-{mark.tone}")
        label = mark.label if len(mark.label) <= 26 else mark.label[:25] + "..."
        left = x + 5 + LETTER * len(label) > WIDTH
        row = sum(abs(x - other) < LETTER * 18 for other in taken) % 8
        taken.append(x)
        anchor, at = ("end", x - 5) if left else ("start", x + 5)
        yield _text(at, HEIGHT - BOTTOM - 8 - 14 * row, label, "tag t-ground", anchor)


def _pointer(chart: Chart, prefix: str) -> Markup:
    """Where the slider stands; a page moves it by the numbers of the axis that it carries."""
    scale = chart.x.scale
    told = (scale.kind, scale.low, scale.high, LEFT, WIDTH - RIGHT)
    return Markup(
        '<line class="now t-ink" x1="0" x2="0" y1="{}" y2="{}" data-of="{}" '
        'data-track="{}" data-axis="{}" visibility="hidden"/>'
    ).format(TOP, HEIGHT - BOTTOM, prefix, chart.track, " ".join(str(v) for v in told))


def _entry_map(figure: EntryMap) -> tuple[int, Markup]:
    strips = figure.strips
    tall = min(22.0, max(3.0, 420 / max(1, len(strips))))
    left = min(170.0, 16 + LETTER * max([len(s.label) for s in strips] or [0]))
    wide, top = WIDTH - left - RIGHT, 34
    every = max(1, math.ceil(13 / tall))
    parts = list(_ramp(figure, left))
    gap = 2.0 if tall > 8 else 0.0
    for row, strip in enumerate(strips):
        y = top + row * tall
        parts.append(_rect(left, y, wide, tall - gap, "empty"))
        pixels = [
            (0, 0, 0, 0) if cell is None else (*palette.between(palette.RAMP, cell), 255)
            for cell in strip.cells
        ]
        parts.append(_image(left, y, wide, tall - gap, data_url([pixels])))
        if row % every == 0:
            label = strip.label if len(strip.label) < 26 else "..." + strip.label[-23:]
            parts.append(_text(left - 8, y + (tall - gap) / 2 + 4, label, "", "end"))
    below = top + len(strips) * tall + 16
    parts.append(_text(left, below, "first to enter", "axis"))
    parts.append(_text(WIDTH - RIGHT, below, "last, or never", "axis", "end"))
    return math.ceil(below + 10), Markup("").join(parts)


def _ramp(figure: EntryMap, left: float) -> Iterable[Markup]:
    pixels = [(*palette.between(palette.RAMP, k / 63), 255) for k in range(64)]
    x = max(left, 120.0)
    yield _text(x - 8, 18, f"entered at {figure.first}", "axis", "end")
    yield _image(x, 9, 120, 10, data_url([pixels]))
    yield _text(x + 128, 18, figure.last, "axis")
    after = x + 142 + LETTER * len(figure.last)
    yield _rect(after, 9, 14, 10, "empty")
    yield _text(after + 20, 18, "never", "axis")


def _image(x: float, y: float, width: float, height: float, address: str) -> Markup:
    places = [_num(v) for v in (x, y, width, height)]
    return Markup(
        '<image x="{}" y="{}" width="{}" height="{}" preserveAspectRatio="none" href="{}"/>'
    ).format(*places, address)


def _sheet(figure: FilterSheet) -> tuple[int, Markup]:
    across = 8 if len(figure.tiles) <= 40 else 12
    cell = (WIDTH - 16) / across
    side = cell - 10
    parts, y, row = [], 4.0, 0
    for alive, heading in ((True, "in the support at the end"), (False, "not in it")):
        tiles = [tile for tile in figure.tiles if tile.alive == alive]
        if not tiles:
            continue
        parts.append(_text(8, y + 14, f"{len(tiles)} {heading}", "axis"))
        y += 22
        for place, tile in enumerate(tiles):
            row, column = divmod(place, across)
            left, top = 8 + column * cell + 3, y + row * (cell + 12)
            parts.append(_image(left, top, side, side, data_url(tile.pixels)))
            kind = "t-ticket" if alive else "dead t-soft"
            parts.append(
                Markup('<rect x="{}" y="{}" width="{}" height="{}" class="frame {}"/>').format(
                    *[_num(v) for v in (left, top, side, side)], kind
                )
            )
            parts.append(_text(left + side / 2, top + side + 13, tile.label, "tick", "middle"))
        y += (row + 1) * (cell + 12) + 8
    return math.ceil(y), Markup("").join(parts)
