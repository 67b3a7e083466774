# SPDX-License-Identifier: Apache-2.0
"""Run: the folder between training and everything after it, plain files only (no torch here)."""

from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from dessilbi.storage import read_json, write_json

SCHEMA_VERSION = 1


class TrainingError(RuntimeError):
    """A run cannot go on; what it wrote so far stays."""


@dataclass(frozen=True)
class Run:
    """The names of the files of a run folder.

    Args:
        folder: The run folder.
    """

    folder: FilePath

    def __post_init__(self) -> None:
        """Accept strings."""
        object.__setattr__(self, "folder", FilePath(self.folder))

    @property
    def recipe(self) -> FilePath:
        """The complete recipe the run was trained with (JSON)."""
        return self.folder / "recipe.json"

    @property
    def environment(self) -> FilePath:
        """Versions, devices and threads (JSON)."""
        return self.folder / "environment.json"

    @property
    def init(self) -> FilePath:
        """The initialisation (safetensors)."""
        return self.folder / "init.safetensors"

    @property
    def model(self) -> FilePath:
        """The final dense weights W and buffers (safetensors)."""
        return self.folder / "model.safetensors"

    @property
    def metrics(self) -> FilePath:
        """One line per epoch (JSON lines)."""
        return self.folder / "metrics.jsonl"

    @property
    def path(self) -> FilePath:
        """The recorded path (JSON lines)."""
        return self.folder / "path.jsonl"

    @property
    def scores(self) -> FilePath:
        """||V||/lam and ||W|| per block at the end (safetensors)."""
        return self.folder / "scores.safetensors"

    @property
    def tickets(self) -> FilePath:
        """Folder of the tickets taken from this run."""
        return self.folder / "tickets"

    @property
    def family(self) -> FilePath:
        """Accuracies of tickets of several densities (JSON), where they were judged."""
        return self.folder / "family.json"

    @property
    def status(self) -> FilePath:
        """How far the run came (JSON)."""
        return self.folder / "status.json"

    def set_status(self, status: str, **facts: Any) -> None:
        """Record "running", "finished", "interrupted" or "failed" with further facts."""
        write_json(self.status, {"schema": SCHEMA_VERSION, "status": status, **facts})

    def read_status(self) -> dict[str, Any]:
        """Return what :meth:`set_status` wrote last.

        Raises:
            FileNotFoundError: The folder is not a run folder.
            ValueError: The file is damaged.
        """
        return read_json(self.status)

    def read_recipe(self) -> dict[str, Any]:
        """Return the recipe as it was written.

        Raises:
            FileNotFoundError: The folder is not a run folder.
            ValueError: The file is damaged.
        """
        if not self.recipe.is_file():
            raise FileNotFoundError(
                f"{self.folder} is not a run folder: it has no {self.recipe.name}; "
                f"name a folder that `dessilbi train` has written"
            )
        return read_json(self.recipe)


def create_run(folder: str | FilePath) -> Run:
    """Create an empty run folder.

    Raises:
        FileExistsError: The folder has files in it: a run is never overwritten.
        OSError: The folder cannot be made.
    """
    run = Run(FilePath(folder))
    if run.folder.exists() and (not run.folder.is_dir() or any(run.folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists and is not empty: a run is never overwritten; name another with --out"
        )
    run.folder.mkdir(parents=True, exist_ok=True)
    return run


def free_path(parent: str | FilePath, name: str, suffix: str = "") -> FilePath:
    """Return ``parent/name+suffix``, or with -2, -3, ... after the name where that is taken."""
    candidate, number = FilePath(parent) / (name + suffix), 1
    while candidate.exists():
        number += 1
        candidate = FilePath(parent) / f"{name}-{number}{suffix}"
    return candidate
