# SPDX-License-Identifier: Apache-2.0
"""Starting: what a run begins with where that is not a fresh model of its recipe.

Weights of an earlier run, a ticket that is enforced while it trains, and the cut that made its
model smaller. All of it lies in the run folder, so that the run can go on without the earlier one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from dessilbi.blocks.ticket import Ticket
from dessilbi.compaction.blueprint import Blueprint, OtherModelError, rebuild
from dessilbi.files.runs import Run
from dessilbi.files.sealing import check_sealed
from dessilbi.files.storage import DamagedFileError, as_json, read_json, to_json, told_by
from dessilbi.files.tensorfiles import load_tensors
from dessilbi.saving.manifest import CutEntry, cut_entry
from dessilbi.training.data import Data
from dessilbi.training.ingredients import model_of
from dessilbi.training.recipes import Recipe, RecipeError

VERSION = 1


class _File(BaseModel):
    """The content of start.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = VERSION
    cut: CutEntry | None
    ticket: str | None
    trained: bool
    recalibrate: bool
    told: dict[str, Any]


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        weights: The first weights and buffers, by name, of the model after the cut.
        ticket: Enforced while training, in the shapes after the cut.
        blueprint: How a fresh model of the recipe becomes this run's smaller one.
        trained: Whether the weights were trained, so that they are worth judging at once.
        recalibrate: Whether BatchNorm statistics are re-estimated before the end is judged.
        told: Where all this came from: plain values, for people and tables.
    """

    weights: Mapping[str, Tensor]
    ticket: Ticket | None = None
    blueprint: Blueprint | None = None
    trained: bool = False
    recalibrate: bool = True
    told: Mapping[str, Any] = field(default_factory=dict)

    def build(self, recipe: Recipe, data: Data) -> nn.Module:
        """Return the model of a recipe, cut and with the first weights.

        Raises:
            ValueError: They are of another model.
        """
        return filled(built(recipe, data, self), self.weights, "this start")

    def files(self, run: Run) -> dict[str, bytes]:
        """Return name -> content of what a run folder keeps of it, the weights left out."""
        digest = self.ticket.digest() if self.ticket is not None else None
        told = _File(
            cut=cut_entry(self.blueprint) if self.blueprint is not None else None,
            ticket=digest,
            trained=self.trained,
            recalibrate=self.recalibrate,
            told=dict(self.told),
        )
        files = {run.start.name: as_json(told.model_dump(mode="json"))}
        if self.ticket is not None:
            files[run.ticket.name] = self.ticket.to_bytes()
        return files


def load_start(run: Run) -> Start | None:
    """Return what a run began with, or None where that was a fresh model of its recipe.

    Raises:
        DamagedFileError: A file of it is damaged or missing.
    """
    if not run.start.is_file():
        return None
    try:
        told = _File.model_validate_json(to_json(read_json(run.start)))
        if told.schema_version != VERSION:
            raise ValueError(
                f"schema version {told_by(told.schema_version, 40)}, this release reads {VERSION}"
            )
        blueprint = told.cut.blueprint() if told.cut is not None else None
        check_sealed(run.start, run.init)
        weights = load_tensors(run.init)
        ticket = None
        if told.ticket is not None:
            check_sealed(run.ticket)
            ticket = Ticket.load(run.ticket)
        if ticket is not None and ticket.digest() != told.ticket:
            raise ValueError(f"{run.ticket.name} is another ticket than the one it names")
    except (ValidationError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DamagedFileError(
            f"{run.start} cannot be used ({reason}): restore the run folder from a copy"
        ) from None
    return Start(weights, ticket, blueprint, told.trained, told.recalibrate, told.told)


def built(
    recipe: Recipe, data: Data, start: Start | None, sizes: Mapping[str, int] | None = None
) -> nn.Module:
    """Return a fresh model of a recipe, cut as the start says, or as wide as it has grown.

    Raises:
        ValueError: The cut is of another model.
    """
    model = model_of(recipe, data, sizes=sizes)
    if start is None or start.blueprint is None:
        return model
    try:
        return rebuild(model, start.blueprint, ()).train(model.training)
    except OtherModelError as error:
        raise ValueError(f"the start of this run does not fit {recipe.model}: {error}") from None


def check_not_grown(recipe: Recipe, run: Run) -> None:
    """Refuse to begin with the weights of a run that grew.

    Raises:
        RecipeError: Its network has other widths than the recipe's model.
    """
    if recipe.grow is not None:
        raise RecipeError(
            f"{run.folder} grew while it was trained, and no other run can begin with its weights "
            f"yet: fine-tune its tickets when they are compacted"
        )


def filled(model: nn.Module, weights: Mapping[str, Tensor], origin: object) -> nn.Module:
    """Put weights and buffers into a model, in place.

    Raises:
        ValueError: They are of another model.
    """
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:2])
        raise ValueError(f"{origin} does not hold this recipe's weights ({reason})") from None
    return model
