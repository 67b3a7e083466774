# SPDX-License-Identifier: Apache-2.0
"""Evidence: all that a report may say of a run, read from its folder and nothing else.

What is damaged is refused, as everywhere. What is only missing becomes a note: an interrupted run,
a path without judged points, or a run of an older release still have a page, which says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from dessilbi.blocks.ticket import Ticket
from dessilbi.files.runs import Run
from dessilbi.files.sealing import check_sealed, read_sealed
from dessilbi.files.storage import read_json, read_lines, told_by
from dessilbi.path.path import Path
from dessilbi.reporting.summary import Row, rows_of

MOST_TICKETS = 40
WORST = (OSError, ValueError, LookupError, TypeError)


@dataclass(frozen=True)
class Chosen:
    """A ticket that somebody took from the run: its file, and how it was chosen."""

    name: str
    density: float
    step: int | None
    how: str


@dataclass(frozen=True)
class Retrained:
    """A folder of tickets trained again, and its table as it was written."""

    name: str
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Evidence:
    """A run as plain values.

    Attributes:
        run: Its folder.
        label: What to call it among the others.
        recipe: As it was written; empty where a loop of one's own recorded the path.
        status: As it was written; empty where it is missing.
        environment: Likewise.
        path: None where none was recorded.
        rows: The recorded points.
        metrics: A line per epoch.
        growth: A line per size of a network that grows.
        tickets: Those that were taken from the run.
        family: Judged tickets of several densities, or None.
        retrained: What was trained from tickets, and is finished.
        notes: What is missing, each a sentence.
    """

    run: Run
    label: str
    recipe: Mapping[str, Any]
    status: Mapping[str, Any]
    environment: Mapping[str, Any]
    path: Path | None
    rows: Sequence[Row]
    metrics: Sequence[Mapping[str, Any]]
    growth: Sequence[Mapping[str, Any]]
    tickets: Sequence[Chosen]
    family: Mapping[str, Any] | None
    retrained: Sequence[Retrained]
    notes: list[str] = field(default_factory=list)

    @property
    def own_loop(self) -> bool:
        """Whether the folder has a path and no recipe: it is not of ``dessilbi train``."""
        return not self.recipe

    @property
    def judged(self) -> list[Row]:
        """The points whose accuracies were measured."""
        return [row for row in self.rows if row.accuracy is not None]

    @property
    def steps_per_epoch(self) -> float | None:
        """Steps of an epoch, as points and lines tell; None where they do not."""
        for row in reversed(self.rows):
            if row.epoch:
                return row.step / row.epoch
        return self.metrics[-1]["step"] / self.metrics[-1]["epoch"] if self.metrics else None

    def epoch_of(self, step: float) -> float | None:
        """Return the epoch of a step."""
        steps = self.steps_per_epoch
        return None if steps is None else step / steps


def evidence_of(folder: str | FilePath, label: str | None = None) -> Evidence:
    """Read a run folder.

    Args:
        folder: The run folder.
        label: What to call it; by default its name.

    Raises:
        FileNotFoundError: It is not a run folder.
        ValueError: A file of it is damaged.
    """
    run = Run(FilePath(folder))
    recipe = run.read_recipe() if run.recipe.is_file() or not _has_path(run) else {}
    notes: list[str] = []
    status = run.read_status() if run.status.is_file() else {}
    environment = run.read_environment() if run.environment.is_file() else {}
    path = Path.load(folder) if _has_path(run) else None
    rows = rows_of(path) if path is not None else ()
    found = Evidence(
        run=run,
        label=label or run.folder.absolute().name,
        recipe=recipe,
        status=status,
        environment=environment,
        path=path,
        rows=rows,
        metrics=_lines(run.metrics),
        growth=_lines(run.growth),
        tickets=_tickets(run, notes),
        family=read_sealed(run.family) if run.family.is_file() else None,
        retrained=_retrained(run, notes),
        notes=notes,
    )
    _note_what_is_missing(found)
    return found


def _has_path(run: Run) -> bool:
    """Whether there is a path: a run that was killed in its first line has none."""
    if not run.path.is_file():
        return False
    with run.path.open("rb") as file:
        return file.readline(1 << 20).endswith(b"\n")


def _lines(file: FilePath) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    check_sealed(file)
    return list(read_lines(file))


def _tickets(run: Run, notes: list[str]) -> list[Chosen]:
    found: list[Chosen] = []
    files = sorted(run.tickets.glob("*.safetensors")) if run.tickets.is_dir() else []
    for file in files[:MOST_TICKETS]:

        def read(file: FilePath = file) -> Chosen:
            ticket = Ticket.load(file)
            told = ticket.origin
            by_step = told.get("kind") in ("entered", "support")
            step = told.get("step") if by_step else None
            return Chosen(
                file.stem, ticket.density, step if type(step) is int else None, _how(told)
            )

        _try(read, found, f"the ticket {file.name}", notes)
    if len(files) > MOST_TICKETS:
        notes.append(f"Of {len(files)} tickets the first {MOST_TICKETS} are shown.")
    return found


def _how(origin: Mapping[str, Any]) -> str:
    if origin.get("kind") == "entered":
        return f"all that had entered by step {origin.get('step')}"
    if origin.get("kind") == "support":
        return f"the support at step {origin.get('step')}"
    return f"a budget, ranked by {origin.get('order', 'score')}"


def _retrained(run: Run, notes: list[str]) -> list[Retrained]:
    found: list[Retrained] = []
    files = sorted(run.retrained.glob("*/results.json")) if run.retrained.is_dir() else []
    for file in files:

        def read(file: FilePath = file) -> Retrained:
            rows = read_json(file)["rows"]
            wanted = ("mode", "density", "accuracy", "before", "std", "repetitions", "epochs")
            return Retrained(file.parent.name, [{key: row[key] for key in wanted} for row in rows])

        _try(read, found, f"the retraining {file.parent.name}", notes)
    return found


def _try(read: Callable[[], Any], found: list[Any], what: str, notes: list[str]) -> None:
    """What lies beside the run is not needed for its page: where it is damaged, that is said."""
    try:
        found.append(read())
    except WORST as error:
        notes.append(f"{what} could not be read ({told_by(error)}).".capitalize())


def _note_what_is_missing(found: Evidence) -> None:
    status, notes = found.status.get("status"), found.notes
    if found.own_loop:
        notes.append(
            "This path was recorded outside of dessilbi train. There is no recipe to make the "
            "model from, so parameters and MACs are unknown, and layers are not closed."
        )
    elif status is None:
        notes.append("The folder does not say how far the run came.")
    elif status != "finished":
        reason = found.status.get("reason")
        because = f" ({told_by(reason)})" if reason else ""
        notes.append(f"This run has not finished: its status is {status}{because}.")
    if found.path is None:
        notes.append(
            "No path was recorded: nothing was selected in this run, or it was stopped before its "
            "first point."
        )
    elif not found.rows:
        notes.append("The path has no recorded point yet.")
    elif len(found.rows) == 1:
        notes.append("The path has a single recorded point, so there are no curves yet.")
    if found.rows and not found.judged:
        notes.append("No point of the path was judged, so no accuracies of tickets are known.")
    if not found.metrics and not found.own_loop:
        notes.append("No epoch is over yet, so there are no numbers by epoch.")


def labels_of(folders: Sequence[FilePath]) -> list[str]:
    """Return a name for each run, its folder's, with what lies above where two are called alike.

    >>> labels_of([FilePath("/a/one"), FilePath("/b/one"), FilePath("/b/two")])
    ['a/one', 'b/one', 'two']
    """
    whole = [folder.absolute() for folder in folders]
    names = [place.name for place in whole]
    return [
        f"{place.parent.name}/{name}" if names.count(name) > 1 else name
        for place, name in zip(whole, names, strict=True)
    ]
