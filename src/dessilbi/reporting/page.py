# SPDX-License-Identifier: Apache-2.0
"""The page: several runs as one HTML file that needs no network and runs no code but its own.

Names in a run folder may be anything. The template escapes what it is given, the script only ever
sets text, and the page's own policy allows neither another style or script nor any address.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path as FilePath
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dessilbi.files.storage import to_json
from dessilbi.reporting import palette, wording
from dessilbi.reporting.charts import Figure
from dessilbi.reporting.comparison import macs_chart, side_by_side
from dessilbi.reporting.evidence import Evidence, evidence_of, labels_of
from dessilbi.reporting.frames import Frames, frames_of
from dessilbi.reporting.sections import drawn, figures_of, section_of
from dessilbi.reporting.svg import SHAPES

ASSETS = "dessilbi.reporting.assets"
MOST_RUNS = 12


@dataclass(frozen=True)
class Report:
    """Runs that are read, ready to be drawn.

    Attributes:
        runs: What was found of each.
        frames: The positions of each run's slider.
    """

    runs: Sequence[Evidence]
    frames: Sequence[Frames]

    @property
    def shared(self) -> list[Figure]:
        """Figures of all runs together."""
        if len(self.runs) < 2:
            return []
        cost = macs_chart(self.runs, self.frames)
        return [*side_by_side(self.runs), *([cost] if cost else [])]

    def figures(self) -> dict[str, Figure]:
        """Return every figure by a name for its file."""
        found: dict[str, Figure] = {figure.name: figure for figure in self.shared}
        for run, frames in zip(self.runs, self.frames, strict=True):
            for some in figures_of(run, frames).values():
                found |= {f"{run.label}-{figure.name}": figure for figure in some}
        return found

    def html(self) -> str:
        """Return the page."""
        sections = [
            section_of(run, frames, number)
            for number, (run, frames) in enumerate(zip(self.runs, self.frames, strict=True))
        ]
        style, script = Markup(style_sheet()), Markup(asset("report.js"))  # noqa: S704  # our own
        several = len(self.runs) > 1
        page: str = template().render(
            title=f"{len(self.runs)} runs side by side" if several else self.runs[0].label,
            lead=f"{', '.join(run.label for run in self.runs)}."
            if several
            else sections[0]["lead"],
            contents=_contents(sections),
            comparison=self._comparison() if several else None,
            runs=sections,
            style=style,
            script=script,
            style_hash=hash_of(style),
            script_hash=hash_of(script),
            data=for_script([section["data"] for section in sections]),
            made=_made(),
        )
        return page

    def _comparison(self) -> dict[str, Any]:
        rows = [_ending(run, own) for run, own in zip(self.runs, self.frames, strict=True)]
        columns = ["run", "recipe", "data", "status", "density", "dense W", "ticket", "compacted"]
        sets = {str(run.recipe.get("data", "unknown")) for run in self.runs}
        notes = []
        if len(sets) > 1:
            notes.append(
                f"These runs are of different data ({', '.join(sorted(sets))}): their accuracies "
                f"do not compare."
            )
        return {
            "notes": notes,
            "table": {
                "caption": "Where each run ended",
                "columns": columns,
                "rows": rows,
                "note": "Test accuracies at the last judged point; compacted: parameters left of "
                "the dense model's.",
            },
            "figures": [drawn(figure, "all") for figure in self.shared],
        }


def report_of(folders: Sequence[FilePath]) -> Report:
    """Read runs for a report.

    Args:
        folders: Run folders, at most ``MOST_RUNS``.

    Raises:
        FileNotFoundError: One is not a run folder.
        ValueError: A file of one is damaged, or they are too many.
    """
    if not 0 < len(folders) <= MOST_RUNS:
        raise ValueError(
            f"{len(folders)} runs do not fit on one page: give 1 to {MOST_RUNS} run folders"
        )
    labels = labels_of(folders)
    runs = [evidence_of(folder, label) for folder, label in zip(folders, labels, strict=True)]
    return Report(runs, [frames_of(run) for run in runs])


def _ending(run: Evidence, frames: Frames) -> list[str]:
    last = run.judged[-1] if run.judged else None
    cost = frames.frames[-1].cost if frames.frames else None
    return [
        run.label,
        str(run.recipe.get("name", "none")),
        str(run.recipe.get("data", "unknown")),
        str(run.status.get("status", "unknown")),
        wording.share(run.rows[-1].density) if run.rows else "not measured",
        wording.share(last.accuracy if last else run.status.get("accuracy")),
        wording.share(last.ticket_accuracy if last else None),
        wording.share(cost.params / frames.dense.params) if cost and frames.dense else "unknown",
    ]


def _contents(sections: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    if len(sections) > 1:
        runs = [(f"run-{number}", section["label"]) for number, section in enumerate(sections)]
        return [("side-by-side", "Side by side"), *runs]
    section = sections[0]
    path = [("path-0", "From simple to complex")] if section["frame"] else []
    return [*path, *((part["id"], part["heading"]) for part in section["parts"])]


def _made() -> str:
    from dessilbi import __version__

    return (
        f"Made by dessilbi {__version__} from run folders alone. This page loads nothing and sends "
        f"nothing."
    )


def asset(name: str) -> str:
    """Return the text of a file that comes with the package."""
    return resources.files(ASSETS).joinpath(name).read_text(encoding="utf-8")


def template() -> Any:
    """Return the page's template; everything it is given is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(asset("report.html.j2"))


def style_sheet() -> str:
    """Return the page's style sheet with the palette in both themes."""

    def variables(theme: str) -> str:
        return ";".join(f"--{n}:{getattr(tone, theme)}" for n, tone in palette.TONES.items())

    names = palette.TONES
    rules = [f".t-{n}{{stroke:var(--{n});color:var(--{n})}}" for n in names]
    rules += [f".f-{n}{{fill:var(--{n})}}" for n in names]
    dark = f":root{{color-scheme:dark;{variables('dark')}}}"
    return (
        f":root{{color-scheme:light;{variables('light')}}}"
        f"@media screen and (prefers-color-scheme:dark){{{dark}}}"
        f"{SHAPES}{''.join(rules)}\n{asset('report.css')}"
    )


def hash_of(text: str) -> str:
    """Return the checksum by which a page's policy knows a style or script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def for_script(value: Any) -> Markup:
    r"""Return JSON that can stand inside a script element, whatever it holds.

    >>> for_script({"a": "</script>"})
    Markup('{"a": "\\u003c/script\\u003e"}')
    """
    text = json.dumps(json.loads(to_json(value)), ensure_ascii=True)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)  # noqa: S704  # it has no letter left that HTML would read
