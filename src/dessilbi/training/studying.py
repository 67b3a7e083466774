# SPDX-License-Identifier: Apache-2.0
"""Studying: one ticket retrained in several ways and several times, each in its own run folder.

The folder of a study holds what was asked (study.json), the ticket, a run folder for each way and
repetition, and at the end results.json. A study that was cut goes on with what is missing.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path as FilePath
from typing import Any

from dessilbi.blocks.ticket import Ticket
from dessilbi.files.folders import STUDY, kind_of
from dessilbi.files.runs import Run
from dessilbi.files.storage import DamagedFileError, as_json, new_folder, read_json, write_json
from dessilbi.training import loop
from dessilbi.training.finetune import Trained, load_trained
from dessilbi.training.progress import Reporter
from dessilbi.training.retraining import Mode, Wish, data_for, retraining

SCHEMA_VERSION = 1
TICKET, RESULTS = "ticket.safetensors", "results.json"


@dataclass(frozen=True)
class Study:
    """What is retrained: a ticket of a run, in some modes, some times each.

    Attributes:
        folder: Where it lies.
        run: The run the ticket was found in.
        modes: From which weights; see Wish.
        repetitions: Of each mode.
        wish: All else that is wanted; its mode and number are not looked at.
        data_root: Folder of the data sets.
    """

    folder: FilePath
    run: Run
    modes: tuple[Mode, ...]
    repetitions: int
    wish: Wish
    data_root: str | None = None

    @property
    def wishes(self) -> list[Wish]:
        """One for each mode and repetition."""
        numbers = range(self.repetitions)
        return [replace(self.wish, mode=m, number=n) for m in self.modes for n in numbers]

    def place(self, wish: Wish) -> Run:
        """The run folder of a wish."""
        return Run(self.folder / f"{wish.mode}-{wish.number}")


@dataclass(frozen=True)
class Row:
    """What a mode came to over its repetitions; accuracies and deviations are fractions.

    ``before`` is the test accuracy before any training, where the weights were trained ones.
    ``std`` is the deviation of the sample; None for a single repetition.
    """

    mode: str
    repetitions: int
    density: float
    density_of_model: float
    params: int
    before: float | None
    accuracy: float
    std: float | None
    val_accuracy: float
    epochs: int


def new_study(study: Study, ticket: Ticket) -> Study:
    """Make the folder of a study; it appears with its ticket in it, or not at all.

    Raises:
        FileExistsError: The folder holds files.
        ValueError, FileNotFoundError: Ticket, run and data do not fit; nothing has been written.
        OSError: It cannot be made.
    """
    trained = load_trained(study.run, data_root=study.data_root)
    for mode in study.modes:  # all that can be refused is refused before anything is trained
        wish = replace(study.wish, mode=mode)
        retraining(study.run, trained, ticket, wish, data_for(trained, wish, root=study.data_root))
    with new_folder(study.folder) as place:
        told = {
            "schema": SCHEMA_VERSION,
            "run": str(study.run.folder.absolute()),
            "modes": list(study.modes),
            "repetitions": study.repetitions,
            "wish": asdict(study.wish),
        }
        (place / STUDY).write_bytes(as_json(told))
        ticket.save(place / TICKET)
    return study


def open_study(folder: FilePath, *, data_root: str | None = None) -> Study:
    """Return a study that was begun; where data lies is not taken from its folder.

    Raises:
        FileNotFoundError: The folder is none.
        DamagedFileError: Its file is damaged.
    """
    file = folder / STUDY
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} is no folder of a retraining: {kind_of(folder, STUDY)}; name one that "
            f"`dessilbi retrain` has made"
        )
    told = read_json(file)
    try:
        run, wish = Run(FilePath(told["run"])), Wish(**told["wish"])
        modes, repetitions = tuple(told["modes"]), int(told["repetitions"])
        return Study(folder, run, modes, repetitions, wish, data_root)
    except (LookupError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{file} is damaged or not ours ({error}): restore it") from None


def carry_out(study: Study, *, device: str = "auto", reporter: Reporter | None = None) -> list[Row]:
    """Train what is missing of a study, and return its table, which is also written.

    Raises:
        ValueError, FileNotFoundError: The ticket, the data or the run do not fit.
        TrainingError, OSError: As :func:`loop.train`.
    """
    left = [wish for wish in study.wishes if not _is_finished(study.place(wish))]
    if left:
        ticket = Ticket.load(study.folder / TICKET)
        trained = load_trained(study.run, data_root=study.data_root)
        for wish in left:
            _train(study, trained, ticket, wish, device=device, reporter=reporter)
    rows = table_of(study)
    cells = [{**_told(study.place(w)), "folder": str(study.place(w).folder)} for w in study.wishes]
    told = {"schema": SCHEMA_VERSION, "rows": [asdict(row) for row in rows], "cells": cells}
    write_json(study.folder / RESULTS, told)
    return rows


def _train(
    study: Study,
    trained: Trained,
    ticket: Ticket,
    wish: Wish,
    *,
    device: str,
    reporter: Reporter | None,
) -> None:
    run = study.place(wish)
    if run.recipe.is_file():
        loop.resume(run.folder, data_root=study.data_root, reporter=reporter)
        return
    data = data_for(trained, wish, root=study.data_root)
    recipe, start = retraining(study.run, trained, ticket, wish, data)
    loop.train(
        recipe,
        run.folder,
        data_root=study.data_root,
        reporter=reporter,
        device=device,
        start=start,
    )


def table_of(study: Study) -> list[Row]:
    """Return what each mode of a finished study came to."""
    rows = []
    for mode in study.modes:
        told = [_told(study.place(wish)) for wish in study.wishes if wish.mode == mode]
        accuracies = [one["accuracy"] for one in told]
        before = [one["before"]["accuracy"] for one in told if one.get("before")]
        rows.append(
            Row(
                mode=mode,
                repetitions=len(told),
                density=_mean([one["density"] for one in told]),
                density_of_model=_mean([one["density_of_model"] for one in told]),
                params=told[0]["params"],
                before=_mean(before) if before else None,
                accuracy=_mean(accuracies),
                std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                val_accuracy=_mean([one["val_accuracy"] for one in told]),
                epochs=told[0]["epochs"],
            )
        )
    return rows


def _told(run: Run) -> dict[str, Any]:
    """What a finished retraining says of itself: where it began and how it ended."""
    status, start = run.read_status(), read_json(run.start)["told"]
    epochs = run.read_recipe()["epochs"]
    return {**start, **{k: v for k, v in status.items() if k != "density"}, "epochs": epochs}


def _is_finished(run: Run) -> bool:
    return run.status.is_file() and run.read_status()["status"] == "finished"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
