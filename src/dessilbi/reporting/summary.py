# SPDX-License-Identifier: Apache-2.0
"""Summary: the numbers of a run folder as plain values, for tables, figures and JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path as FilePath
from typing import Any, TypeVar

from dessilbi.blocks.ticket import Ticket
from dessilbi.files.runs import Run
from dessilbi.path.path import Path

T = TypeVar("T")
METRICS = (
    "epoch",
    "accuracy",
    "ticket_accuracy",
    "gamma_accuracy",
    "val_accuracy",
    "val_ticket_accuracy",
)


@dataclass(frozen=True)
class Row:
    """One recorded point. Accuracies are fractions; None where the point was not judged.

    ``accuracy`` is that of W on the test split, ``ticket_accuracy`` that of W on supp(Gamma) with
    nothing retrained, ``gamma_accuracy`` that of Gamma; ``val_...`` are on the validation split.
    ``layers`` gives the density of supp(Gamma) per tensor.
    """

    step: int
    epoch: float | None
    time: float
    density: float
    accuracy: float | None
    ticket_accuracy: float | None
    gamma_accuracy: float | None
    val_accuracy: float | None
    val_ticket_accuracy: float | None
    layers: dict[str, float]


@dataclass(frozen=True)
class Summary:
    """A run in numbers: its recipe and its recorded points."""

    folder: FilePath
    recipe: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def judged(self) -> tuple[Row, ...]:
        """The points whose accuracies were measured."""
        return tuple(row for row in self.rows if row.accuracy is not None)

    def to_json(self) -> dict[str, Any]:
        """Return {"points": [...]} as plain values."""
        return {"points": [asdict(row) for row in self.rows]}


def summarise(folder: str | FilePath) -> Summary:
    """Read a run folder.

    Raises:
        FileNotFoundError: The folder is not a run folder.
        ValueError: A file of it is damaged.
    """
    run = Run(FilePath(folder))
    own_loop = run.path.is_file() and not run.recipe.is_file()
    recipe = {"name": run.folder.absolute().name} if own_loop else run.read_recipe()
    return Summary(run.folder, recipe, rows_of(Path.load(folder)))


def rows_of(path: Path) -> tuple[Row, ...]:
    """Return the recorded points of a path as plain values."""
    rows = []
    for point, masks in zip(path.points, path.history.supports(), strict=True):
        metrics = {name: point.metrics.get(name) for name in METRICS}
        layers = Ticket(masks, path.specs).densities()
        rows.append(
            Row(point.step, time=point.time, density=point.density, layers=layers, **metrics)
        )
    return tuple(rows)


def thinned(rows: Sequence[T], count: int) -> list[T]:
    """Return about ``count`` rows spread evenly, always with the first and the last."""
    count = max(count, 2)
    if len(rows) <= count:
        return list(rows)
    picks = {round(i * (len(rows) - 1) / (count - 1)) for i in range(count)}
    return [rows[i] for i in sorted(picks)]
